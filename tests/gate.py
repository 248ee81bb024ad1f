"""The gate, for steps that are callables of tensors: what a test does to see one judged."""

import torch

from export.comparison import ParityRun
from export.families import Normalizer
from export.loaders.torch_step import TorchStep
from export.manifest import Precision, step_inputs, step_outputs
from export.parity import Gate
from export.process import plain_process
from export.weights import pack_weights
from model.actor_critic import ActorCritic
from tests.loaded_step import TensorStep


def gate_of(
    policy: ActorCritic,
    normalizer: Normalizer | None = None,
    *,
    precision: Precision = "fp32",
    max_batch_size: int = 7,
) -> Gate:
    """The gate of a policy's weights; it may be used again."""
    return Gate(
        pack_weights(policy, normalizer),
        policy.spec,
        precision=precision,
        max_batch_size=max_batch_size,
        device=torch.device("cpu"),
    )


def judged(gate: Gate, step: TensorStep) -> ParityRun:
    """How close the step came; ParityError where it is not the policy's."""
    inputs, outputs = step_inputs(gate.spec), step_outputs(gate.spec)
    with plain_process():
        return gate.check({"it": TorchStep("it", step, inputs, outputs)}).runs["it"]
