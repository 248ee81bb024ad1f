"""HAProxy's files, the cluster's compose file and Kubernetes' agree with what the service is."""

import re
from pathlib import Path

import pytest
import yaml

from service.settings import Settings
from tamiyo_client.exchange import Patience
from tests.running_server import ROOT
from tests.test_deploy import DOCKERFILE, KUBERNETES, Yaml, load

HAPROXY = (ROOT / "deploy" / "haproxy.cfg").read_text()


@pytest.fixture(scope="module")
def compose() -> Yaml:
    return load("compose.yaml")


@pytest.fixture(scope="module")
def cluster() -> dict[str, Yaml]:
    services: dict[str, Yaml] = load("compose.cluster.yaml")["services"]
    return services


@pytest.fixture(scope="module")
def kubernetes() -> dict[tuple[str, str], Yaml]:
    """Every object of the files by kind and name."""
    objects = [
        described
        for file in sorted(KUBERNETES.glob("*.yaml"))
        for described in yaml.safe_load_all(file.read_text())
    ]
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found


def preset(name: str) -> str:
    """What deploy/haproxy.cfg takes where the environment has nothing."""
    (value,) = re.findall(rf"^  presetenv {name} (\S+)$", HAPROXY, re.MULTILINE)
    assert isinstance(value, str)
    return value


def replicas_of(backend: str) -> dict[str, str]:
    """Those that deploy/replicas.cfg has for it, and how the name goes on."""
    text = (ROOT / "deploy" / "replicas.cfg").read_text().partition(f"backend {backend} ")[2]
    lines = text.partition("\nbackend ")[0]
    found = re.findall(
        r'^  server (\S+) "(\S+?)\$\{DOMAIN\}(\S+)"(?: id (\d+))?$', lines, re.MULTILINE
    )
    assert [name for name, host, _, _ in found] == [host for _, host, _, _ in found]
    if backend == "sessions":
        assert [f"tamiyo-{number}" for _, _, _, number in found] == [name for name, *_ in found]
    return {name: port for name, _, port, _ in found}


def test_haproxy_knows_the_replicas_of_both_lists_and_the_service_s_port() -> None:
    of_sessions = replicas_of("sessions")
    assert of_sessions == replicas_of("stateless")
    assert len(of_sessions) == 8
    (port,) = set(of_sessions.values())
    assert f"\nEXPOSE {port.removeprefix(':')}\n" in DOCKERFILE


def test_haproxy_waits_longer_than_the_service_and_less_than_its_clients(
    kubernetes: dict[tuple[str, str], Yaml],
) -> None:
    of_the_service = {name: field.default for name, field in Settings.model_fields.items()}
    timeouts_s = {
        name: int(seconds)
        for name, seconds in re.findall(r"^  timeout (\S+) (\d+)s$", HAPROXY, re.MULTILINE)
    }
    assert timeouts_s["server"] > of_the_service["timeout_ms"] / 1000
    assert timeouts_s["http-keep-alive"] == of_the_service["keep_alive_s"]
    assert timeouts_s["http-request"] == of_the_service["read_timeout_s"]
    returns_within_s = int(preset("RETURNS_WITHIN_S"))
    assert of_the_service["drain_s"] < returns_within_s < Patience().timeout_s
    page = (ROOT / "docs" / "scaling.md").read_text()
    balancer = kubernetes["Deployment", "tamiyo-balancer"]["spec"]["template"]["spec"]
    given = environment_of(balancer["containers"][0])["RETURNS_WITHIN_S"]
    assert f"`RETURNS_WITHIN_S` ({returns_within_s}; in Kubernetes {given})" in page


def test_the_cluster_of_compose_is_replicas_that_haproxy_knows_each_with_its_own(
    cluster: dict[str, Yaml], compose: Yaml
) -> None:
    file = load("compose.cluster.yaml")
    replicas = {name: of for name, of in cluster.items() if name.startswith("tamiyo")}
    assert len(replicas) == 2
    assert replicas.keys() < replicas_of("sessions").keys()
    for own in ("cpuset", "ports", "volumes"):
        assert len({str(of[own]) for of in replicas.values()}) == len(replicas)
    volumes = {volume.partition(":")[0] for of in replicas.values() for volume in of["volumes"]}
    assert file["volumes"].keys() == volumes | {"prometheus", "grafana"}
    alone = compose["services"]["tamiyo"]
    for same in ("image", "build", "read_only", "cap_drop", "security_opt", "stop_grace_period"):
        assert all(of[same] == alone[same] for of in replicas.values())
    assert cluster["haproxy"]["depends_on"].keys() == replicas.keys()
    assert {name for name, of in cluster.items() if "extends" in of} == {"prometheus", "grafana"}
    for name, of in cluster.items():
        if "extends" in of:
            assert of["extends"] == {"file": "compose.yaml", "service": name}


def test_of_the_cluster_only_haproxy_is_open_to_the_network(cluster: dict[str, Yaml]) -> None:
    ports = {name: of["ports"] for name, of in cluster.items() if "ports" in of}
    assert ports.pop("haproxy") == ["8000:8000"]
    assert all(port.startswith("127.0.0.1:800") for of in ports.values() for port in of)


def test_the_cluster_mounts_files_that_there_are_where_haproxy_reads_them(
    cluster: dict[str, Yaml], kubernetes: dict[tuple[str, str], Yaml]
) -> None:
    mounted = [
        volume.split(":")[:2]
        for of in cluster.values()
        for volume in of.get("volumes", [])
        if volume.startswith(".")
    ]
    assert {source for source, _ in mounted} == {
        f"./deploy/{name}" for name in ("haproxy.cfg", "replicas.cfg", "prometheus.cluster.yml")
    }
    assert all((ROOT / source).is_file() for source, _ in mounted)
    folder = cluster["haproxy"]["command"][-1]
    assert {str(Path(target).parent) for source, target in mounted if source.endswith("cfg")} == {
        folder
    }
    pod = kubernetes["Deployment", "tamiyo-balancer"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == cluster["haproxy"]["command"]
    assert container["image"] == cluster["haproxy"]["image"]
    assert container["volumeMounts"][0]["mountPath"] == folder
    assert pod["volumes"][0]["configMap"]["name"] == "tamiyo-balancer"
    made_of = "--from-file=deploy/haproxy.cfg --from-file=deploy/replicas.cfg"
    command = f"kubectl create configmap tamiyo-balancer {made_of}"
    for place in ("deploy/kubernetes/balancer.yaml", "docs/scaling.md"):
        assert command in (ROOT / place).read_text()


def test_prometheus_scrapes_every_replica_of_the_cluster_and_haproxy(
    cluster: dict[str, Yaml],
) -> None:
    content = load("deploy/prometheus.cluster.yml")
    assert content["rule_files"] == load("deploy/prometheus.yml")["rule_files"]
    jobs = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in content["scrape_configs"]
    }
    of_haproxy = cluster["haproxy"]["environment"]["METRICS_BIND"].replace("0.0.0.0", "haproxy")
    replicas = [f"{name}:8000" for name in cluster if name.startswith("tamiyo")]
    assert jobs == {"tamiyo": replicas, "haproxy": [of_haproxy]}


def test_haproxy_is_given_the_time_to_end(
    cluster: dict[str, Yaml], kubernetes: dict[tuple[str, str], Yaml]
) -> None:
    ends_within_s = int(re.findall(r"^  hard-stop-after (\d+)s$", HAPROXY, re.MULTILINE)[0])
    assert int(cluster["haproxy"]["stop_grace_period"].removesuffix("s")) > ends_within_s
    pod = kubernetes["Deployment", "tamiyo-balancer"]["spec"]["template"]["spec"]
    pause_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > ends_within_s + pause_s


def environment_of(container: Yaml) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container["env"]}


def test_kubernetes_names_its_replicas_as_haproxy_finds_them(
    kubernetes: dict[tuple[str, str], Yaml],
) -> None:
    replicas = kubernetes["StatefulSet", "tamiyo"]["spec"]
    names = [f"tamiyo-{replicas['ordinals']['start'] + at}" for at in range(replicas["replicas"])]
    assert set(names) <= replicas_of("sessions").keys()
    service = kubernetes["Service", replicas["serviceName"]]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    pod = kubernetes["Deployment", "tamiyo-balancer"]["spec"]["template"]["spec"]
    domain = environment_of(pod["containers"][0])["DOMAIN"]
    assert domain == f".{replicas['serviceName']}.$(NAMESPACE).svc.cluster.local"


def test_kubernetes_runs_the_image_as_it_is_meant(
    kubernetes: dict[tuple[str, str], Yaml],
) -> None:
    pod = kubernetes["StatefulSet", "tamiyo"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    uid = pod["securityContext"]["runAsUser"]
    assert f"\nUSER {uid}:{pod['securityContext']['runAsGroup']}\n" in DOCKERFILE
    assert f"\nEXPOSE {container['ports'][0]['containerPort']}\n" in DOCKERFILE
    drain_s = Settings.model_fields["drain_s"].default
    assert pod["terminationGracePeriodSeconds"] > drain_s
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    files = {name: path for name, path in environment_of(container).items() if path.startswith("/")}
    assert {str(Path(path).parent) for path in files.values()} == set(mounts.values())
    (claim,) = kubernetes["StatefulSet", "tamiyo"]["spec"]["volumeClaimTemplates"]
    assert mounts[claim["metadata"]["name"]] == str(Path(files["TAMIYO_SNAPSHOT"]).parent)
    secret = pod["volumes"][0]["secret"]["secretName"]
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert f"kubectl create secret generic {secret} --from-file=act=" in page


def test_every_pod_may_nothing_that_it_does_not_need_and_is_asked_how_it_is(
    kubernetes: dict[tuple[str, str], Yaml],
) -> None:
    pods = {
        name: described["spec"]["template"]["spec"]
        for (kind, name), described in kubernetes.items()
        if kind in ("StatefulSet", "Deployment")
    }
    assert pods.keys() == {"tamiyo", "tamiyo-balancer"}
    for name, pod in pods.items():
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        named = {port["name"] for port in container["ports"]}
        probes = [container[f"{of}Probe"]["httpGet"] for of in ("readiness", "liveness")]
        assert {probe["port"] for probe in probes} <= named
        assert {probe["path"] for probe in probes} <= {"/readyz", "/healthz"}
        for kind in ("PodDisruptionBudget", "NetworkPolicy"):
            spec = kubernetes[kind, name]["spec"]
            selector = spec.get("selector") or spec["podSelector"]
            assert selector["matchLabels"] == kubernetes["Service", name]["spec"]["selector"]
