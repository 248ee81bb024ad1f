"""What the trainer makes of spaces, by hand and by its own code."""

from typing import Any

import numpy as np
import pytest

from model.checkpoint_file import CheckpointError
from model.sb3.space_text import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, parse_space
from model.sb3.spaces import choices, flat_observation, heads
from model.sb3.spec import ObservationPart
from model.step_spec import HeadSpec

VECTOR = Box((6,), "float32")


def sizes(space: Space) -> list[tuple[str, int]]:
    assert choices(space) == sum(head.size for head in heads(space))
    return [(head.name, head.size) for head in heads(space)]


def test_each_choice_is_a_head() -> None:
    assert heads(Discrete(5, 3)) == (HeadSpec(name="action", size=5),)
    assert sizes(MultiDiscrete((3, 4, 2), (0, 1, 0))) == [
        *(("action_0", 3), ("action_1", 4), ("action_2", 2)),
    ]
    assert sizes(MultiBinary((2,))) == [("action_0", 2), ("action_1", 2)]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (VECTOR, "its action space is a Box, and continuous actions are not exported"),
        (
            MultiBinary((4, 2)),
            "its action space is a MultiBinary of shape (4, 2), and no trainer has actions of one",
        ),
        (Dict(()), "its action space is a Dict, and no trainer has actions of one"),
    ],
    ids=["box", "two dimensions", "dict"],
)
def test_other_actions_are_refused(space: Space, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        choices(space)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("space", "part"),
    [
        (Box((2, 3), "float32"), ObservationPart(kind="box", size=6)),
        (Box((2, 3, 4), "float32"), ObservationPart(kind="box", size=24)),
        (Box((7,), "uint8"), ObservationPart(kind="box", size=7)),
        (Discrete(4), ObservationPart(kind="one_hot", size=4)),
        (MultiDiscrete((3, 4), (0, 0)), ObservationPart(kind="one_hot", size=7)),
        (MultiBinary((4,)), ObservationPart(kind="bits", size=4)),
        (MultiBinary((4, 2)), ObservationPart(kind="bits", size=8)),
    ],
)
def test_an_observation_is_flattened(space: Space, part: ObservationPart) -> None:
    assert flat_observation(space) == (part.size, (part,))
    keyed = part.model_copy(update={"key": "it"})
    assert flat_observation(Dict((("it", space),))) == (part.size, (keyed,))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            Box((3, 8, 8), "uint8"),
            "its observation space is of images, which the trainer scales or reads by a CNN, and "
            "vectors are read",
        ),
        (
            Dict((("eye", Box((8, 8, 1), "uint8")), ("vec", VECTOR))),
            "its observation space's 'eye' is of images, which the trainer scales or reads by a "
            "CNN, and vectors are read",
        ),
        (
            Discrete(3, 1),
            "its observation space does not start at 0, and the trainer makes no one-hot of what "
            "does not",
        ),
        (
            Dict((("mode", MultiDiscrete((3, 2), (0, -1))),)),
            "its observation space's 'mode' does not start at 0, and the trainer makes no one-hot "
            "of what does not",
        ),
        (Dict(()), "its observation space is a Dict of nothing"),
        (
            Dict((("a", VECTOR), ("b", VECTOR), ("a", VECTOR))),
            "its observation space has 'a' twice",
        ),
    ],
    ids=["image", "image within", "start", "start within", "nothing", "twice"],
)
def test_other_observations_are_refused(space: Space, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        flat_observation(space)
    assert str(caught.value) == said


def flattened_by_hand(part: ObservationPart, space: Any, value: Any) -> list[float]:
    if part.kind != "one_hot":
        return [float(number) for number in np.asarray(value).ravel()]
    each = [space.n] if hasattr(space, "n") else list(space.nvec)
    return [
        float(choice == index)
        for choice, size in zip(np.atleast_1d(value), each, strict=True)
        for index in range(size)
    ]


def test_the_trainer_s_own_extractors_flatten_so() -> None:
    spaces = pytest.importorskip("gymnasium.spaces")
    preprocessing = pytest.importorskip("stable_baselines3.common.preprocessing")
    layers = pytest.importorskip("stable_baselines3.common.torch_layers")
    torch = pytest.importorskip("torch")
    parts_of = {
        "vec": spaces.Box(-1, 1, (2, 3), np.float32),
        "mode": spaces.Discrete(3),
        "Bits": spaces.MultiBinary((2, 2)),
        "turn": spaces.MultiDiscrete([2, 5]),
        "bytes": spaces.Box(0, 9, (2,), np.uint8),
    }
    whole = spaces.Dict(parts_of)
    whole.seed(3)
    dimension, parts = flat_observation(parse_space(str(whole)))
    extractor = layers.CombinedExtractor(whole)
    assert extractor.features_dim == dimension == sum(part.size for part in parts)
    assert [part.key for part in parts] == ["Bits", "bytes", "mode", "turn", "vec"]
    for _ in range(20):
        sample = whole.sample()
        batch = {key: torch.as_tensor(value)[None] for key, value in sample.items()}
        by_trainer = extractor(preprocessing.preprocess_obs(batch, whole))[0].tolist()
        by_hand = [
            number
            for part in parts
            for number in flattened_by_hand(part, whole[part.key], sample[part.key])
        ]
        assert by_trainer == by_hand


def test_a_space_alone_has_the_trainer_s_size() -> None:
    spaces = pytest.importorskip("gymnasium.spaces")
    preprocessing = pytest.importorskip("stable_baselines3.common.preprocessing")
    for space in (
        spaces.Box(-1, 1, (2, 3, 4), np.float32),
        spaces.Discrete(7),
        spaces.MultiDiscrete([2, 5, 3]),
        spaces.MultiBinary((2, 4)),
    ):
        dimension, _ = flat_observation(parse_space(str(space)))
        assert dimension == preprocessing.get_flattened_obs_dim(space)
