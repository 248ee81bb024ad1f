"""Triton's model repository on disk: a model appears in it complete or not at all.

A model is there in versions, `REPOSITORY/NAME/VERSION/model.onnx`, under one configuration. Knows
nothing of what a configuration says, but that each version's policy stands at its end.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from export.directory import finish_abandoned, staging_beside
from export.stopping import deferred

CONFIG_FILE, MODEL_FILE = "config.pbtxt", "model.onnx"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
FACT = re.compile(
    r'parameters { key: "((?:policy_version|source)(?:\.(\d+))?)" value { string_value: (".*") } }'
)
"""A line of a configuration that says which policy a version is."""
FACT_LINE = 'parameters {{ key: "{}" value {{ string_value: {} }} }}\n'

Facts = dict[str, str]
"""By the names that they have in a configuration, quoted as they stand there."""
Move = tuple[Path, Path]


class RepositoryError(ValueError):
    """The repository holds what is not to be changed; the message says what."""


class Model(NamedTuple):
    """A version to be: its graph, and the configuration that all versions of the model share."""

    name: str
    config: str
    graph: bytes


def publish(models: Sequence[Model], repository: Path, *, policy_version: str, source: str) -> int:
    """Puts all models into the repository, as one version of each, and gives its number.

    Which policy that is stands in each configuration as `parameters`: of the newest version by
    these names, and of each version with its number behind them. Triton may read all the while:
    what it finds is whole. Raises RepositoryError where a model of the name has another
    configuration, or this policy already; then, and where it raises OSError, the repository is as
    it was.
    """
    of_this = {"policy_version": policy_version, "source": source}
    facts = {name: json.dumps(fact, ensure_ascii=False) for name, fact in of_this.items()}
    for path in (repository, *(repository / model.name for model in models)):
        _check_link(path)
    repository = repository.resolve()  # what a link leads to is what gets a directory beside it
    finish_abandoned(repository)
    older = {model.name: _facts(model, repository / model.name) for model in models}
    if all(of.get("policy_version") == facts["policy_version"] for of in older.values()):
        raise RepositoryError(
            f"{repository / models[0].name} has {policy_version} as its newest version already"
        )
    version = 1 + max(max(_versions(repository / model.name), default=0) for model in models)
    of_version = {f"{name}.{version}": fact for name, fact in facts.items()}
    # Not inside: Triton takes every directory of a repository for a model, hidden ones as well.
    with deferred() as heeded, staging_beside(repository) as staging:
        with heeded():
            for model in models:
                _write(model, staging / model.name, version, older[model.name] | facts | of_version)
        place(_moves(staging, repository, models, version))
    return version


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise RepositoryError(f"{path} is a link to {os.readlink(path)}, which does not exist")


def _facts(model: Model, directory: Path) -> Facts:
    """What is known of the versions there are, of which there may be none."""
    if not directory.exists():
        return {}
    try:
        lines = _lines((directory / CONFIG_FILE).read_text("utf-8", errors="replace"))
    except FileNotFoundError:
        raise RepositoryError(f"{directory} exists, and has no {CONFIG_FILE}") from None
    kept = [line for line in lines if not FACT.fullmatch(line)]
    for theirs, ours in zip_longest(kept, _lines(model.config)):
        if theirs != ours:
            raise RepositoryError(
                f"{directory / CONFIG_FILE} is not what would be written for this artifact: it "
                f"has {_quoted(theirs)}, not {_quoted(ours)}; --name gives another model"
            )
    versions = _versions(directory)
    found = [match for match in map(FACT.fullmatch, lines) if match]
    return {match[1]: match[3] for match in found if match[2] is None or int(match[2]) in versions}


def _lines(text: str) -> list[str]:
    """As Triton reads them: `splitlines` ends some at letters that a source's name may have."""
    return text.removesuffix("\n").split("\n")


def _quoted(line: str | None) -> str:
    return "an end" if line is None else f"`{line.strip()}`"


def _versions(directory: Path) -> list[int]:
    if not directory.exists():
        return []
    return [int(path.name) for path in directory.iterdir() if path.name.isdecimal()]


def _write(model: Model, directory: Path, version: int, facts: Facts) -> None:
    (directory / str(version)).mkdir(parents=True)
    (directory / str(version) / MODEL_FILE).write_bytes(model.graph)
    lines = (FACT_LINE.format(name, fact) for name, fact in sorted(facts.items()))
    (directory / CONFIG_FILE).write_text(model.config + "".join(lines), "utf-8")
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # Triton is another user


def _moves(
    staging: Path, repository: Path, models: Sequence[Model], version: int
) -> Iterator[Move]:
    if not repository.exists():
        staging.chmod(0o755)
        yield staging, repository
        return
    for model in models:
        ours, theirs = staging / model.name, repository / model.name
        if theirs.exists():
            for name in (str(version), CONFIG_FILE):
                yield ours / name, theirs / name
        else:
            yield ours, theirs


def place(moves: Iterable[Move]) -> None:
    """Makes all moves, or none; a file that is in the way is replaced."""
    with ExitStack() as undo:
        for ours, theirs in moves:
            if theirs.is_file():
                older = ours.with_name(f"{ours.name}.older")
                shutil.copyfile(theirs, older)
                ours.replace(theirs)
                undo.callback(older.replace, theirs)
            else:
                ours.rename(theirs)
                undo.callback(theirs.rename, ours)
        undo.pop_all()
