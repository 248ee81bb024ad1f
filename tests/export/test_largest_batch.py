"""The largest batch an artifact can be made for: from 2 to what a machine can still check."""

from pathlib import Path

import pytest

from export.__main__ import main
from export.exporter import export_policy
from export.formats import FormatError
from model.policy import FactoredRecurrentActorCritic

BEYOND = [0, 1, -3, 4097, 65536]


@pytest.mark.parametrize("max_batch_size", BEYOND)
def test_largest_batch_that_no_graph_or_no_machine_can_have_is_refused_before_any_work(
    max_batch_size: int, policy: FactoredRecurrentActorCritic, tmp_path: Path
) -> None:
    stages: list[str] = []
    with pytest.raises(
        FormatError, match=rf"^the largest batch is {max_batch_size}; from 2 to 4096 can be had: "
    ):
        export_policy(
            policy,
            None,
            tmp_path / "missing" / "it",
            name="it",
            max_batch_size=max_batch_size,
            on_stage=stages.append,
        )
    assert stages == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [*map(str, BEYOND), "64.5", "many", ""])
def test_command_line_refuses_such_a_largest_batch_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--preset=tamiyo-v1", f"--output={tmp_path / 'it'}", f"--max-batch-size={text}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"argument --max-batch-size: {text!r} is not a number from 2 to 4096" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
