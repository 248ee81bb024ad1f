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
OP_NAMES: Final = ("wait", "germinate", "set alpha target", "prune", "fossilize", "advance")

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

ADD, MULTIPLY, GATE = range(1, 4)
ALPHA_ALGORITHM_OF_STYLE: Final = (ADD, MULTIPLY, ADD, GATE)
SIGMOID_ADD: Final = 2
"""How a seed is blended in; the style that is taken where none matters."""

TEMPO_EPOCHS: Final = (3, 5, 8)
STANDARD_TEMPO: Final = 1
"""How long BLENDING's ramp takes."""

ALPHA_TARGETS: Final = (0.5, 0.7, 1.0)
FULL: Final = 2
ALPHA_SPEED_EPOCHS: Final = (0, 3, 5, 8)
"""How far alpha is to go, and how long it takes; 0 is at once."""
