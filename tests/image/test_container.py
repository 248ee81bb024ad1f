"""The image, run: hardened, with the default artifact, mounted ones and bad ones."""

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest

from export.exporter import export_policy
from export.manifest import Manifest
from model.policy import FactoredRecurrentActorCritic
from model.spec import PolicySpec
from tests.image.conftest import Contents
from tests.image.engine import refused_start, running_container
from tests.naive import NaivePolicy
from tests.random_inputs import weights_of
from tests.running_server import RunningServer, running_server
from tests.traffic import NUM_STEPS, Episodes, client_of, play, run, stop_under_load

pytestmark = pytest.mark.image

NUM_CLIENTS = 64


@pytest.fixture(scope="module")
def mounted(policy: FactoredRecurrentActorCritic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one artifact of the tiny policy in it."""
    folder = tmp_path_factory.mktemp("mounted")
    folder.chmod(0o755)
    export_policy(policy, None, folder / "tiny", name="tiny", formats=("onnx",), max_batch_size=64)
    return folder


def mount(path: Path) -> str:
    return f"--volume={path}:/artifacts:ro"


def policy_of(server: RunningServer) -> str:
    name: str = httpx.get(f"{server.address}/policy").raise_for_status().json()["name"]
    return name


async def bodies(server: RunningServer, episodes: Episodes) -> list[list[bytes]]:
    """Every answer to every step, all sessions at once."""

    async def of_session(client: httpx.AsyncClient, env: int) -> list[bytes]:
        got = []
        for step in range(NUM_STEPS):
            request = episodes.session_request(env, step, "env")
            response = await client.post("/act", json=request)
            assert response.status_code == 200, response.text
            got.append(response.content)
        return got

    async with client_of(server) as client:
        return await asyncio.gather(
            *(of_session(client, env) for env in range(len(episodes.seeds)))
        )


def test_sixty_four_clients_get_byte_for_byte_what_the_service_outside_answers(
    contents: Contents,
) -> None:
    spec = Manifest.read(contents.artifact).spec
    assert isinstance(spec, PolicySpec)
    episodes = Episodes.random(spec, 1, NUM_CLIENTS)
    with running_container() as container, running_server(contents.artifact) as outside:
        assert policy_of(container) == policy_of(outside) == "tamiyo-v1"
        assert run(bodies(container, episodes)) == run(bodies(outside, episodes))
        assert container.stop() == outside.stop() == 0
        assert "Traceback" not in container.log()


@pytest.mark.parametrize("inner", ["", "tiny"])
def test_a_mounted_artifact_is_served_instead_of_the_default_one(
    mounted: Path, spec: PolicySpec, policy: FactoredRecurrentActorCritic, inner: str
) -> None:
    naive = NaivePolicy(spec, weights_of(policy))
    episodes = Episodes.random(spec, 2)

    async def answers(server: RunningServer) -> list[list[dict[str, object]]]:
        async with client_of(server) as client:
            return await asyncio.gather(
                *(play(client, episodes, env, "env") for env in range(len(episodes.seeds)))
            )

    with running_container(mount(mounted / inner)) as container:
        assert policy_of(container) == "tiny"
        episodes.check(naive, run(answers(container)))


def test_one_of_several_is_named_by_the_environment(mounted: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name in ("best", "other"):
        shutil.copytree(mounted / "tiny", tmp_path / name)
    code, output, error = refused_start(mount(tmp_path))
    assert (code, output) == (2, "")
    assert error == (
        "service: /artifacts: holds several artifacts; --artifact or TAMIYO_ARTIFACT names one of "
        "/artifacts/best, /artifacts/other\n"
    )
    with running_container(mount(tmp_path), "--env=TAMIYO_ARTIFACT=best") as container:
        assert policy_of(container) == "tiny"


def test_a_damaged_artifact_is_refused_in_one_sentence(mounted: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    damaged = Path(shutil.copytree(mounted / "tiny", tmp_path / "damaged"))
    file = damaged / Manifest.read(damaged).formats["onnx"].file
    file.write_bytes(file.read_bytes()[:-1])
    code, output, error = refused_start(mount(damaged))
    assert (code, output) == (2, "")
    assert error.startswith(f"service: /artifacts/{file.name}: its SHA-256 is not the one in")
    assert error.count("\n") == 1


def test_a_mount_that_holds_nothing_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """As docker mounts it where the path on the host was misspelt."""
    tmp_path.chmod(0o755)
    code, output, error = refused_start(mount(tmp_path))
    assert (code, output) == (2, "")
    assert error.startswith("service: /artifacts: is not an artifact")
    assert error.count("\n") == 1


def test_nothing_is_imported_from_what_is_mounted(mounted: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    shutil.copytree(mounted / "tiny", tmp_path, dirs_exist_ok=True)
    for name in ("service", "numpy", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the mount')\n")
    with running_container(mount(tmp_path)) as container:
        assert policy_of(container) == "tiny"


def test_a_gpu_asked_of_an_image_on_a_host_without_one_is_refused() -> None:
    code, output, error = refused_start("--env=TAMIYO_DEVICE=cuda")
    assert (code, output) == (2, "")
    assert error.startswith("service: no GPU is visible here, and cuda was asked for")
    assert error.count("\n") == 1


def test_sigterm_under_load_ends_it_with_0(mounted: Path, spec: PolicySpec) -> None:
    with running_container(mount(mounted)) as container:
        stop_under_load(container, Episodes.random(spec, 3))
