"""What a host is given (image, compose files, dashboard) agrees with what the service is."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from model.spec import PolicySpec
from service.engine.snapshots import Snapshots
from service.http.key_file import KeyFile
from service.metrics import Metrics
from service.settings import Settings
from tests.running_server import ROOT
from tests.service.fakes import Bench

DOCKERFILE = (ROOT / "Dockerfile").read_text()
GRAFANA = ROOT / "deploy" / "grafana"
COMPOSE_FILES = ("compose.yaml", "compose.gpu.yaml", "compose.cluster.yaml")
KUBERNETES = ROOT / "deploy" / "kubernetes"

Yaml = dict[str, Any]


def load(path: str | Path) -> Yaml:
    content: Yaml = yaml.safe_load((ROOT / path).read_text())
    return content


@pytest.fixture(scope="module")
def compose() -> Yaml:
    return load("compose.yaml")


@pytest.fixture(scope="module")
def alerts() -> list[Yaml]:
    return [rule for group in load("deploy/alerts.yml")["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard() -> Yaml:
    content: Yaml = json.loads((GRAFANA / "dashboards" / "tamiyo.json").read_text())
    return content


def test_the_image_s_version_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'org.opencontainers.image.version="{project["version"]}"' in DOCKERFILE


def test_the_build_is_given_what_the_dockerfile_copies_and_no_more() -> None:
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {name.partition("/")[0] for names in copies for name in names.split()}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_every_variable_the_image_and_the_compose_files_set_is_a_setting() -> None:
    files = [*(ROOT / name for name in COMPOSE_FILES), *KUBERNETES.glob("*.yaml")]
    texts = [DOCKERFILE, *(file.read_text() for file in files)]
    names = {name for text in texts for name in re.findall(r"\bTAMIYO_([A-Z_]+)", text)}
    assert names >= {"ARTIFACT", "HOST", "PORT", "DEVICE"}
    assert {name.lower() for name in names} <= Settings.model_fields.keys()


def test_every_file_that_is_mounted_exists_and_every_volume_is_declared(compose: Yaml) -> None:
    sources = [
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
    ]
    files = {source for source in sources if source.startswith(".")}
    assert len(files) == 4
    assert all((ROOT / source).exists() for source in files)
    assert set(sources) - files == compose["volumes"].keys()


def test_every_service_has_a_health_check(compose: Yaml) -> None:
    without = {name for name, of in compose["services"].items() if "healthcheck" not in of}
    assert without == {"tamiyo"}, "whose image has one"
    assert DOCKERFILE.count("\nHEALTHCHECK ") == 1


def test_only_the_service_is_open_to_the_network(compose: Yaml) -> None:
    ports = {name: of["ports"] for name, of in compose["services"].items()}
    assert ports.pop("tamiyo") == ["8000:8000"]
    assert all(port.startswith("127.0.0.1:") for of in ports.values() for port in of)


def test_compose_waits_longer_than_the_service_drains(compose: Yaml) -> None:
    wait_s = int(compose["services"]["tamiyo"]["stop_grace_period"].removesuffix("s"))
    assert wait_s > Settings.model_fields["drain_s"].default


def test_the_gpu_file_changes_the_service_and_builds_another_target(compose: Yaml) -> None:
    (changed,) = load("compose.gpu.yaml")["services"].items()
    name, service = changed
    assert name in compose["services"]
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE))
    assert {service["build"]["target"], compose["services"][name]["build"]["target"]} <= targets


def test_prometheus_scrapes_the_service_at_the_port_it_listens_on(compose: Yaml) -> None:
    (job,) = load("deploy/prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in compose["services"]
    assert f"\nEXPOSE {port}\n" in DOCKERFILE
    assert f"TAMIYO_PORT={port}\n" in DOCKERFILE


@pytest.fixture
def there_are(spec: PolicySpec, tmp_path: Path) -> set[str]:
    """The samples of a service that has seen something of everything."""
    metrics, bench = Metrics(), Bench(spec)
    metrics.watch_engine(bench.sessions, lambda: 0)
    snapshots = Snapshots(tmp_path / "sessions", bench.kept(), every_s=30.0)
    snapshots.write_last()
    metrics.watch_snapshots(snapshots)
    metrics.count("ok")
    metrics.count_unread("malformed")
    metrics.watch_version("v1", lambda: "sha256:ab12")
    metrics.observe_change("ok", 0.05)

    async def rendered() -> str:  # the tasks of a loop are among the metrics
        return metrics.render().decode()

    families = text_string_to_metric_families(asyncio.run(rendered()))
    return {sample.name for family in families for sample in family.samples}


def test_the_dashboard_asks_only_for_metrics_that_there_are(
    dashboard: Yaml, there_are: set[str]
) -> None:
    queries = " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    )
    asked = set(re.findall(r"\b(?:tamiyo|process)_\w+", queries))
    assert len(asked) > 8
    assert asked <= there_are
    ours = {family for family in there_are if family.startswith("tamiyo_")}
    unseen = {name for name in ours - asked if not name.endswith(("_created", "_sum", "_count"))}
    assert unseen == {"tamiyo_tasks"}


def test_alarms_are_of_metrics_that_there_are_and_each_is_explained(
    alerts: list[Yaml], there_are: set[str]
) -> None:
    expressions = " ".join(rule["expr"] for rule in alerts)
    asked = set(re.findall(r"\b(?:tamiyo|process)_\w+", expressions))
    assert asked <= there_are
    explained = (ROOT / "docs" / "operations.md").read_text()
    assert all(f"`{rule['alert']}`" in explained for rule in alerts)
    assert {rule["labels"]["severity"] for rule in alerts} == {"page", "warn"}


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    return found


def test_prometheus_accepts_its_configuration_and_the_alarms(tmp_path: Path, promtool: str) -> None:
    configurations = ("prometheus.yml", "prometheus.cluster.yml")
    for name in (*configurations, "alerts.yml"):
        shutil.copy(ROOT / "deploy" / name, tmp_path)
    for check in (["rules", "alerts.yml"], *(["config", name] for name in configurations)):
        done = subprocess.run(
            [promtool, "check", *check], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "SUCCESS" in done.stdout


HOUR = "x60"  # in which a value is scraped each minute
FIRST = f"0+0x9 1+0{HOUR}"
AFTER_A_GAP = f"1+0x20 _x20 1+0{HOUR}"  # in which nobody asked
NONE_YET = f"0+0{HOUR}"
FAILED = 'tamiyo_act_requests_total{instance="a",result="internal"}'
REFUSED = 'tamiyo_weights_changes_total{instance="a",result="invalid"}'
SERVES = "tamiyo_policy_info"
AGE, EVERY = (f'tamiyo_snapshot_{of}_seconds{{instance="a"}}' for of in ("age", "every"))
STARTED = 'process_start_time_seconds{instance="a"}'  # the tests begin in 1970
ALARMS: dict[str, tuple[str, dict[str, str], dict[int, bool]]] = {  # after so many minutes
    "the first 500": ("Fails", {FAILED: FIRST}, {9: False, 10: True, 14: True, 16: False}),
    "another": ("Fails", {FAILED: f"1+0x30 2+0{HOUR}"}, {29: False, 32: True, 40: False}),
    "an old one after a gap": ("Fails", {FAILED: AFTER_A_GAP}, {20: False, 41: False, 44: False}),
    "no 500": ("Fails", {FAILED: NONE_YET}, {0: False, 3: False, 30: False}),
    "the first push that is refused": (
        "PushesRefused",
        {REFUSED: FIRST},
        {9: False, 10: True, 19: True, 21: False},
    ),
    "another one": (
        "PushesRefused",
        {REFUSED: f"1+0x30 2+0{HOUR}"},
        {29: False, 32: True, 45: False},
    ),
    "an old one, and nobody asked": (
        "PushesRefused",
        {REFUSED: AFTER_A_GAP},
        {41: False, 44: False, 50: False},
    ),
    "pushes that serve": ("PushesRefused", {REFUSED.replace("invalid", "ok"): FIRST}, {12: False}),
    "two policies": (
        "ReplicasDiffer",
        {
            f'{SERVES}{{instance="a",name="v1",policy_version="1"}}': f"1+0{HOUR}",
            f'{SERVES}{{instance="b",name="v2",policy_version="2"}}': f"1+0{HOUR}",
        },
        {30: False},
    ),
    "replicas of one, and another": (
        "ReplicasDiffer",
        {
            f'{SERVES}{{instance="a",name="v1",policy_version="1"}}': f"1+0{HOUR}",
            f'{SERVES}{{instance="b",name="v1",policy_version="2"}}': f"1+0{HOUR}",
            f'{SERVES}{{instance="c",name="v2",policy_version="3"}}': f"1+0{HOUR}",
        },
        {5: False, 30: True},
    ),
    "an old snapshot": (
        "SnapshotOld",
        {AGE: f"151+0{HOUR}", EVERY: f"30+0{HOUR}", STARTED: f"0+0{HOUR}"},
        {5: True},
    ),
    "a late one": (
        "SnapshotOld",
        {AGE: f"149+0{HOUR}", EVERY: f"30+0{HOUR}", STARTED: f"0+0{HOUR}"},
        {5: False},
    ),
    "one of every hour": (
        "SnapshotOld",
        {AGE: f"3600+0{HOUR}", EVERY: f"3600+0{HOUR}", STARTED: f"-36000+0{HOUR}"},
        {5: False},
    ),
    "a server that has begun with an old one": (
        "SnapshotOld",
        {AGE: f"7200+60{HOUR}", EVERY: f"300+0{HOUR}", STARTED: f"120+0{HOUR}"},
        {5: False, 16: False, 20: True},
    ),
    "none at all": (
        "SnapshotOld",
        {AGE: f"0+60{HOUR}", EVERY: f"30+0{HOUR}", STARTED: f"0+0{HOUR}"},
        {2: False, 5: True},
    ),
}


@pytest.mark.parametrize(("alarm", "series", "fires"), ALARMS.values(), ids=ALARMS)
def test_an_alarm_fires_when_it_should(
    tmp_path: Path, promtool: str, alarm: str, series: dict[str, str], fires: dict[int, bool]
) -> None:
    firing = f'count(ALERTS{{alertname="Tamiyo{alarm}",alertstate="firing"}})'
    asked = [
        {
            "expr": firing,
            "eval_time": f"{minutes}m",
            "exp_samples": [{"labels": "{}", "value": 1}] if is_fired else [],
        }
        for minutes, is_fired in fires.items()
    ]
    given = [{"series": name, "values": values} for name, values in series.items()]
    content = {
        "rule_files": [str(ROOT / "deploy" / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": asked}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_keys_of_the_recipe_are_found_by_root_and_closed_to_all_but_the_service(
    tmp_path: Path,
) -> None:
    """The caller's own shell may no longer look into a folder that is the service's."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    recipe = re.findall(r"^mkdir -p keys\n.*?(?=^docker )", page, re.DOTALL | re.MULTILINE)[0]
    sudo = tmp_path / "sudo"
    sudo.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> given\nexec "$@"\n')
    (tmp_path / "chown").write_text('#!/bin/sh\necho "$@" > owned\n')
    for command in (sudo, tmp_path / "chown"):
        command.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["sh", "-ec", recipe], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True, timeout=60
    )
    keys = tmp_path / "keys"
    try:
        assert keys.stat().st_mode & 0o777 == 0o500
        assert {file.name: file.stat().st_mode & 0o777 for file in keys.iterdir()} == {
            "act": 0o400,
            "admin": 0o400,
        }
        assert [KeyFile(keys / name).name_of(b"") for name in ("act", "admin")] == [None, None]
    finally:
        keys.chmod(0o700)
    assert (tmp_path / "owned").read_text() == "-R 10001 keys\n"
    given = (tmp_path / "given").read_text().splitlines()
    assert not [word for word in given if word.startswith("keys/")], "expanded by the caller"


def test_the_dashboard_s_source_is_the_one_that_is_provisioned(
    dashboard: Yaml, compose: Yaml
) -> None:
    provisioning = GRAFANA / "provisioning"
    (source,) = load(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose["services"]
    (provider,) = load(provisioning / "dashboards" / "tamiyo.yml")["providers"]
    mounts = compose["services"]["grafana"]["volumes"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_the_dashboard_s_panels_are_told_apart(dashboard: Yaml) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])
