"""The packages depend on one another in one direction only, and torch stays where it belongs."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tamiyo_client", "model", "export", "service")
OF_THE_SERVER = PACKAGES[1:]
FOLDERS = {"tamiyo_client": "client/tamiyo_client"}
READING_ARTIFACTS = (
    "export.artifact",
    "export.manifest",
    "export.parameters",
    "export.signature",
)
ALLOWED: dict[str, Callable[[str], bool]] = {
    "tamiyo_client": lambda module: module.startswith("tamiyo_client"),
    "model": lambda module: module.startswith("model."),
    "export": lambda module: module.startswith(("model.", "export.")),
    "service": lambda module: (
        module.startswith(("service.", "export.loaders"))
        or module in ("model.step_spec", "tamiyo_client.noise", *READING_ARTIFACTS)
    ),
}
SILENCES_ONNXRUNTIME = 'os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")'
NEEDS_TORCH = {
    "export.loaders.machine",
    "export.loaders.torch_formats",
    "export.loaders.torch_step",
    "service.runtime.cpu_device",
    "service.runtime.cuda_device",
    "service.runtime.device_runtime",
    "service.runtime.device_states",
    "service.runtime.device_step",
}
NEEDS_RAY = {"service.ray_app", "service.ray_router"}


CLIENTS = ("service/bench/", "service/demo/")
FOR_CLIENTS = {
    *("model.action_masks", "model.lifecycle", "model.observations", "model.spec"),
    "tamiyo_client",
}
"""Torch-free, for environments and loads; the service itself knows nothing of them."""
SEND = {"export/push.py", "export/commands.py"}
"""Clients of the service as well: they speak as the others do."""


ROOMS = {
    "http": (
        *("service.http.", "service.engine."),
        *("service.runtime.arrays", "service.runtime.protocol"),
    ),
    "engine": ("service.engine.", "service.runtime."),
    "runtime": ("service.runtime.",),
}
"""What each of the service's rooms imports of the service; `bench` and `demo` are its clients."""
BESIDE_THE_ROOMS = {"service.artifact", "service.errors", "service.metrics", "service.settings"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS.get(package, package)).rglob("*.py"))


def imported_modules(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            yield node.module or ""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_stands_before_it(package: str) -> None:
    for source in sources(package):
        for module in imported_modules(source):
            if module.partition(".")[0] in PACKAGES:
                where = source.relative_to(ROOT).as_posix()
                is_allowed = ALLOWED[package](module)
                is_allowed |= where.startswith(CLIENTS) and module in FOR_CLIENTS
                is_allowed |= where in SEND and module.startswith("tamiyo_client")
                assert is_allowed, f"{where} imports {module}"


def test_the_rooms_of_the_service_import_one_way_only() -> None:
    for room, allowed in ROOMS.items():
        for source in sources(f"service/{room}"):
            for module in imported_modules(source):
                if module.partition(".")[0] == "service":
                    is_allowed = module.startswith(allowed) or module in BESIDE_THE_ROOMS
                    assert is_allowed, f"{source.relative_to(ROOT)} imports {module}"


def test_what_stands_beside_the_rooms_knows_none_of_them() -> None:
    for name in BESIDE_THE_ROOMS:
        source = ROOT / f"{name.replace('.', '/')}.py"
        for module in imported_modules(source):
            assert not module.startswith("service.") or module in BESIDE_THE_ROOMS, module


def test_every_room_of_the_service_is_known() -> None:
    rooms = {path.parent.name for path in (ROOT / "service").glob("*/__init__.py")}
    assert rooms == {*ROOMS, "bench", "demo"}


def test_importing_a_package_imports_none_of_its_modules() -> None:
    packages = [
        ".".join(source.parent.relative_to(ROOT).parts)
        for package in OF_THE_SERVER
        for source in (ROOT / package).rglob("__init__.py")
    ]
    code = (
        f"import sys, {', '.join(packages)}; loaded = set(sys.modules) - {set(packages)!r}; "
        f"sys.exit(any(name.partition('.')[0] in {OF_THE_SERVER!r} for name in loaded))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_exporter_and_the_pusher_are_the_export_packages_own_functions() -> None:
    import export
    from export.exporter import export_policy
    from export.push import push_policy

    assert export.export_policy is export_policy
    assert export.push_policy is push_policy
    assert set(export.__all__) == {"export_policy", "push_policy"}
    with pytest.raises(AttributeError, match="no attribute 'import_policy'"):
        _ = export.import_policy


def test_the_service_imports_no_torch_until_a_torch_runtime_is_loaded() -> None:
    modules = [
        ".".join(source.relative_to(ROOT).with_suffix("").parts)
        for source in sources("service") + sources("export/loaders")
        if source.name != "__init__.py"
    ]
    light = [module for module in modules if module not in NEEDS_TORCH | NEEDS_RAY]
    assert len(light) < len(modules)
    code = f"import sys, {', '.join(light)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_client_imports_nothing_that_is_slow_or_large() -> None:
    heavy = {"torch", "gymnasium", "stable_baselines3", "fastapi", "httpcore", "onnxruntime"}
    code = f"import sys, tamiyo_client; sys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_but_a_programs_entry_reads_the_environment(package: str) -> None:
    for source in sources(package):
        text = source.read_text().replace(SILENCES_ONNXRUNTIME, "")
        assert "os.environ" not in text, source.relative_to(ROOT)
