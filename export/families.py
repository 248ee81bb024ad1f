"""The families of policies that are exported: what each builds of its spec.

A new family is a spec in `export.manifest`, a module, a step, and one row here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from export.float_error import FloatError, MlpsError, of_gates
from export.manifest import Precision
from export.packed_step import PackedStep
from export.sb3_step import SB3Step
from export.tamiyo_step import TamiyoStep
from model.actor_critic import ActorCritic
from model.normalizer import ObservationNormalizer
from model.policy import FactoredRecurrentActorCritic
from model.sb3.normalizer import VecNormalizer
from model.sb3.policy import SB3Policy
from model.sb3.spec import SB3Spec
from model.spec import PolicySpec
from model.step_spec import StepSpec

Normalizer = ObservationNormalizer | VecNormalizer


class Family(NamedTuple):
    """`policy` of a spec; `normalizer` of a spec and the statistics' state_dict, None of none;
    `step` and `float_error` of both. ValueError where the statistics are not the spec's.
    """

    policy: Callable[[Any], ActorCritic]
    normalizer: Callable[[Any, Mapping[str, Tensor]], Normalizer | None]
    step: Callable[[Any, Any, Precision], PackedStep]
    float_error: Callable[[Any, Any, Precision], FloatError]


def family_of(spec: StepSpec) -> Family:
    """That whose spec it is."""
    return FAMILIES[type(spec)]


def _tamiyo_normalizer(
    spec: PolicySpec, statistics: Mapping[str, Tensor]
) -> ObservationNormalizer | None:
    return ObservationNormalizer(**statistics) if statistics else None


def _sb3_normalizer(spec: SB3Spec, statistics: Mapping[str, Tensor]) -> VecNormalizer | None:
    if (spec.normalization is None) != (not statistics):
        raise ValueError("the policy's spec and its statistics do not agree whether it has any")
    if spec.normalization is None:
        return None
    mean = statistics["mean"].double() + statistics["mean_rest"].double()
    return VecNormalizer(mean, statistics["var"], spec.normalization, spec.observation)


FAMILIES: dict[type[StepSpec], Family] = {
    PolicySpec: Family(
        FactoredRecurrentActorCritic, _tamiyo_normalizer, TamiyoStep, lambda *_: of_gates
    ),
    SB3Spec: Family(SB3Policy, _sb3_normalizer, SB3Step, MlpsError),
}
