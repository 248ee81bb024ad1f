"""What the `cpu` image holds, and what it does not."""

import re
import tomllib
from importlib.metadata import version
from pathlib import PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from export.manifest import Manifest
from tests.image.conftest import Contents
from tests.image.engine import inspect_image
from tests.running_server import ROOT

pytestmark = pytest.mark.image

COMPILERS = re.compile(
    r"(.*-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|tcc|rustc|ld|as|make|cmake)(-\d+)?"
)
SITE_PACKAGES = re.compile(r"opt/venv/lib/python[\d.]+/site-packages")


def programs(contents: Contents) -> set[str]:
    paths = map(PurePosixPath, contents.paths)
    return {path.name for path in paths if path.parent.name in ("bin", "sbin")}


def distributions(contents: Contents) -> dict[str, str]:
    """Name and version of everything installed in the virtual environment."""
    found: dict[str, str] = {}
    for path in contents.paths:
        parent, name = PurePosixPath(path).parent, PurePosixPath(path).name
        if SITE_PACKAGES.fullmatch(str(parent)) and name.endswith(".dist-info"):
            project, _, number = name.removesuffix(".dist-info").rpartition("-")
            found[canonicalize_name(project)] = number
    return found


def test_there_is_no_torch(contents: Contents) -> None:
    installed = (path for path in contents.paths if not path.startswith("opt/tamiyo/"))  # not ours
    names = {part for path in installed for part in PurePosixPath(path).parts}
    assert "onnxruntime" in names
    assert names.isdisjoint({"torch", "functorch", "triton", "nvidia", "libtorch.so"})


def test_there_is_no_compiler(contents: Contents) -> None:
    assert "python" in programs(contents)
    assert [name for name in programs(contents) if COMPILERS.fullmatch(name)] == []
    assert [path for path in contents.paths if "/cc1" in path or "/collect2" in path] == []


def test_there_are_no_tests_and_nothing_else_of_the_source_tree(contents: Contents) -> None:
    assert [path for path in contents.under("opt/venv") if "/tests/" in path] == []
    assert [path for path in contents.under("opt/tamiyo") if "test" in path] == []
    packages = {PurePosixPath(path).parts[2] for path in contents.under("opt/tamiyo")}
    metadata = {name for name in packages if name.endswith(".dist-info")}
    assert packages - metadata == {"tamiyo_client", "model", "export", "service"}
    assert contents.under("src") == set()
    # The base image's own pip may have constraints too.
    ours = {path for path in contents.paths if not path.startswith("etc/xdg/pip/")}
    assert not [path for path in ours if path.endswith(("Dockerfile", "constraints.txt"))]


def test_there_is_no_git_and_no_cache_of_pip(contents: Contents) -> None:
    parts = {part for path in contents.paths for part in PurePosixPath(path).parts}
    assert ".git" not in parts
    assert ".cache" not in parts
    assert not contents.under("root/.cache")
    assert "pip" not in distributions(contents)
    assert "setuptools" not in distributions(contents)


def test_what_is_installed_is_what_the_lock_file_pins_and_the_service_needs(
    contents: Contents,
) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): number
        for name, _, number in (line.partition("==") for line in lines if "==" in line)
    }
    installed = distributions(contents)
    assert installed.items() <= pinned.items()
    project, client = (
        tomllib.loads((ROOT / path / "pyproject.toml").read_text())["project"]
        for path in (".", "client")
    )
    needed = {
        canonicalize_name(Requirement(line).name)
        for line in (*project["dependencies"], *client["dependencies"])
    } - {client["name"]}  # which lies beside the service
    assert needed <= installed.keys()
    for_development = {
        canonicalize_name(Requirement(line).name)
        for line in project["optional-dependencies"]["dev"]
    }
    assert installed.keys().isdisjoint(for_development - needed)


def test_modules_are_compiled_as_a_read_only_image_cannot_do_it_later(contents: Contents) -> None:
    sources = {path for path in contents.under("opt/tamiyo") if path.endswith(".py")}
    compiled = {path for path in contents.under("opt/tamiyo") if path.endswith(".pyc")}
    assert len(sources) == len(compiled) > 30


def test_the_default_artifact_is_a_whole_one(contents: Contents) -> None:
    manifest = Manifest.read(contents.artifact)
    assert manifest.name == "tamiyo-v1"
    assert "onnx" in manifest.formats
    for file in manifest.files:
        file.read(contents.artifact)


def test_it_says_what_it_is_and_how_to_run_it() -> None:
    config = inspect_image()
    assert config["Labels"]["org.opencontainers.image.version"] == version("tamiyo-serve")
    assert "org.opencontainers.image.source" in config["Labels"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["python", "-m", "service"]
    assert config["ExposedPorts"].keys() == {"8000/tcp"}
    assert "/readyz" in " ".join(config["Healthcheck"]["Test"])
