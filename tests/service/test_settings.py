import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from service.server import main
from service.settings import Settings

REQUIRED = ["--artifact", "somewhere"]

# Another value than the default for every option, as a flag has it and as it is read.
ANOTHER = {
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "trusted": ("key.pub", Path("key.pub")),
    "act_keys": ("act.keys", Path("act.keys")),
    "admin_keys": ("admin.keys", Path("admin.keys")),
    "runtime": ("torchscript", "torchscript"),
    "device": ("cuda", "cuda"),
    "num_threads": ("2", 2),
    "max_batch_size": ("7", 7),
    "pad_batches": ("true", True),
    "tf32": ("true", True),
    "max_rows": ("8", 8),
    "max_waiting": ("9", 9),
    "max_sessions": ("11", 11),
    "session_idle_s": ("1.5", 1.5),
    "snapshot": ("sessions.snapshot", Path("sessions.snapshot")),
    "snapshot_every_s": ("4.5", 4.5),
    "snapshot_required": ("true", True),
    "timeout_ms": ("2.5", 2.5),
    "max_body_bytes": ("2048", 2048),
    "root_path": ("/tamiyo/v1", "/tamiyo/v1"),
    "keep_alive_s": ("5.5", 5.5),
    "read_timeout_s": ("3.5", 3.5),
    "drain_s": ("0", 0),
    "seed": ("13", 13),
    "log_level": ("debug", "debug"),
}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(environment(name), raising=False)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def environment(name: str) -> str:
    return f"TAMIYO_{name.upper()}"


def parse(*arguments: str) -> Settings:
    return CliApp.run(Settings, cli_args=[*REQUIRED, *arguments])


def fail_to_start(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines on stderr of `python -m service` with these arguments, which it refuses."""
    monkeypatch.setattr(sys, "argv", ["service", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_every_option_has_a_value_to_be_tried_here() -> None:
    assert ANOTHER.keys() | {"artifact"} == Settings.model_fields.keys()


def test_only_the_artifact_is_required() -> None:
    settings = parse()
    assert settings.artifact == Path("somewhere")
    assert settings.host == "127.0.0.1"
    for name, (_, value) in ANOTHER.items():
        assert getattr(settings, name) != value


@pytest.mark.parametrize("name", ANOTHER)
def test_every_option_is_a_flag(name: str) -> None:
    text, value = ANOTHER[name]
    if value is True:
        assert getattr(parse(flag(name)), name)
        assert not getattr(parse(f"--no-{flag(name)[2:]}"), name)
        return
    assert getattr(parse(flag(name), text), name) == value
    assert getattr(parse(f"{flag(name)}={text}"), name) == value


@pytest.mark.parametrize("name", ANOTHER)
def test_every_option_is_a_variable_of_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = ANOTHER[name]
    monkeypatch.setenv(environment(name), text)
    assert getattr(parse(), name) == value


@pytest.mark.parametrize(
    ("largest", "padded", "checked", "sizes"),
    [
        (8, False, 64, (1, 2, 4, 8)),
        (64, False, 4, (1, 2, 4)),
        (8, True, 64, (8,)),
        (64, True, 4, (4,)),
    ],
)
def test_no_batch_is_larger_than_asked_for_or_than_the_artifact_was_checked_with(
    largest: int, padded: bool, checked: int, sizes: tuple[int, ...]
) -> None:
    settings = Settings(artifact=Path("a"), max_batch_size=largest, pad_batches=padded)
    assert settings.batch_sizes(checked) == sizes


def test_the_artifact_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMIYO_ARTIFACT", "elsewhere")
    assert CliApp.run(Settings, cli_args=[]).artifact == Path("elsewhere")


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMIYO_PORT", "1")
    monkeypatch.setenv("TAMIYO_SEED", "2")
    settings = parse("--port", "3")
    assert (settings.port, settings.seed) == (3, 2)


def test_another_program_s_variables_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "1")
    monkeypatch.setenv("TAMIYO_SOMETHING_ELSE", "1")
    assert parse().port == Settings.model_fields["port"].default


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_option_says_what_it_does(name: str) -> None:
    assert Settings.model_fields[name].description


def test_help_lists_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["service", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert flag(name) in text


BAD_VALUES = [
    ("port", "http"),
    ("port", "-1"),
    ("port", "65536"),
    ("runtime", "tensorflow"),
    ("device", "tpu"),
    ("num_threads", "0"),
    ("max_batch_size", "0"),
    ("max_batch_size", "1.5"),
    ("max_rows", "0"),
    ("max_waiting", "0"),
    ("max_sessions", "0"),
    ("max_sessions", "10000000000000"),
    ("session_idle_s", "0"),
    ("session_idle_s", "nan"),
    ("snapshot_every_s", "0"),
    ("snapshot_every_s", "inf"),
    ("timeout_ms", "soon"),
    ("timeout_ms", "-1"),
    ("max_body_bytes", "1"),
    ("drain_s", "-1"),
    ("seed", "-1"),
    ("log_level", "loud"),
]


@pytest.mark.parametrize(("name", "text"), BAD_VALUES)
def test_a_bad_value_stops_the_start_with_one_line_naming_option_and_value(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = fail_to_start([*REQUIRED, f"{flag(name)}={text}"], monkeypatch, capsys)
    assert flag(name) in line
    assert repr(text) in line


def test_a_bad_variable_stops_the_start_just_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TAMIYO_MAX_BATCH_SIZE", "many")
    (line,) = fail_to_start(REQUIRED, monkeypatch, capsys)
    assert "--max-batch-size" in line
    assert "'many'" in line


def test_no_artifact_stops_the_start_with_one_line_naming_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = fail_to_start([], monkeypatch, capsys)
    assert "--artifact is required" in line


@pytest.mark.parametrize("arguments", [["--batch", "1"], ["stray"], ["--port"]])
def test_a_flag_that_does_not_exist_or_lacks_its_value_stops_the_start_naming_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = fail_to_start([*REQUIRED, *arguments], monkeypatch, capsys)
    assert arguments[0] in lines[-1]


def test_an_unknown_setting_is_not_passed_over() -> None:
    with pytest.raises(ValidationError, match="prot"):
        Settings.model_validate({"artifact": "somewhere", "prot": 1})
