"""Steps environments against a tamiyo-serve policy: sessions, retries and autoreset are its own."""

from tamiyo_client.errors import (
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    NotAllowed,
    NotReady,
    Overloaded,
    PolicyError,
    PushConflict,
    ServerError,
    SessionLost,
    StepConflict,
    Unavailable,
    Unreachable,
    VersionMismatch,
)
from tamiyo_client.gym import VectorLoop, wrap
from tamiyo_client.noise import gumbel_noise, row_seed
from tamiyo_client.single import AsyncPolicyClient, PolicyClient
from tamiyo_client.vector import AsyncVectorPolicyClient, VectorPolicyClient
from tamiyo_client.wire import Act, VectorAct

__all__ = [
    "Act",
    "AsyncPolicyClient",
    "AsyncVectorPolicyClient",
    "DeadlineExceeded",
    "Draining",
    "InvalidRequest",
    "NotAllowed",
    "NotReady",
    "Overloaded",
    "PolicyClient",
    "PolicyError",
    "PushConflict",
    "ServerError",
    "SessionLost",
    "StepConflict",
    "Unavailable",
    "Unreachable",
    "VectorAct",
    "VectorLoop",
    "VectorPolicyClient",
    "VersionMismatch",
    "gumbel_noise",
    "row_seed",
    "wrap",
]
