"""What a slot, a seed and an action can be, as the integers of the trainer's wire format.

Data only, and plain integers: torch.compile folds a comparison with an enum's member to a constant
(`tests/model/test_no_enum_compare.py`).
"""

from collections.abc import Mapping
from typing import Final

EMPTY: Final = -1
"""The stage, and the blueprint, of a slot without a seed; ours, the trainer says None."""

UNKNOWN, DORMANT, GERMINATED, TRAINING, BLENDING = range(5)
HOLDING, FOSSILIZED, PRUNED, EMBARGOED, RESETTING = range(6, 11)
STAGES: Final = (
    *(UNKNOWN, DORMANT, GERMINATED, TRAINING, BLENDING),
    *(HOLDING, FOSSILIZED, PRUNED, EMBARGOED, RESETTING),
)
"""In the order of their one-hot; there is no stage 5."""

WAIT, GERMINATE, SET_ALPHA_TARGET, PRUNE, FOSSILIZE, ADVANCE = OPS = tuple(range(6))

HOLD, UP, DOWN = range(3)
"""Where a seed's alpha is going."""

BLUEPRINTS: Final = (
    *("noop", "conv_light", "attention", "norm", "depthwise", "bottleneck", "conv_small"),
    *("conv_heavy", "lora", "lora_large", "mlp_small", "mlp", "flex_attention"),
)
"""The trainer's name of each blueprint, by index."""

BLUEPRINTS_OF_TOPOLOGY: Final[Mapping[str, frozenset[int]]] = {
    "cnn": frozenset({1, 2, 3, 4, 5, 6, 7}),
    "transformer": frozenset({2, 3, 8, 9, 10, 11, 12}),
}
"""The blueprints that may be germinated in a host; noop (0) in none."""

NUM_STYLES, SIGMOID_ADD = 4, 2
NUM_TEMPOS, STANDARD_TEMPO_EPOCHS = 3, 5
NUM_ALPHA_TARGETS, FULL = 3, 2
NUM_ALPHA_SPEEDS = 4
