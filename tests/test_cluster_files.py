"""HAProxy's files, the cluster's compose file and Kubernetes' agree with what the service is."""

import re
from pathlib import Path

import pytest
import yaml

from service.http.connection import LARGEST_HEAD
from service.settings import Settings
from tamiyo_client.exchange import Patience
from tests.running_server import ROOT
from tests.test_deploy import DOCKERFILE, KUBERNETES, Yaml, load

HAPROXY = (ROOT / "deploy" / "haproxy.cfg").read_text()
SCRIPT = (ROOT / "deploy" / "cluster.sh").read_text()


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


def test_the_cluster_of_one_host_has_its_metrics_where_haproxy_has_them() -> None:
    taken = re.findall(r"\$\{METRICS_BIND:-(.*?)\}", SCRIPT)
    assert taken == [preset("METRICS_BIND")]


def section(head: str) -> list[str]:
    """The lines of deploy/haproxy.cfg below this one."""
    below = HAPROXY.split(f"\n{head}\n")[1]
    return [line.strip() for line in re.split(r"\n(?=[a-z])", below)[0].splitlines()]


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
    assert timeouts_s["client"] == of_the_service["keep_alive_s"]
    assert timeouts_s["http-request"] == of_the_service["read_timeout_s"]
    returns_within_s = int(preset("RETURNS_WITHIN_S"))
    assert of_the_service["drain_s"] < returns_within_s < Patience().timeout_s
    page = (ROOT / "docs" / "scaling.md").read_text()
    balancer = kubernetes["Deployment", "tamiyo-balancer"]["spec"]["template"]["spec"]
    given = environment_of(balancer["containers"][0])["RETURNS_WITHIN_S"]
    assert f"`RETURNS_WITHIN_S` ({returns_within_s}; in Kubernetes {given})" in page


def test_haproxy_takes_headers_as_long_as_the_service_does_and_hang_ups_as_they_are() -> None:
    (bufsize,) = re.findall(r"^  tune\.bufsize (\d+)$", HAPROXY, re.MULTILINE)
    kept_for_rewriting = 1024
    assert int(bufsize) - kept_for_rewriting == LARGEST_HEAD
    assert "option abortonclose" in section("defaults base")


def test_a_session_s_replica_is_waited_for_and_no_other_is_asked() -> None:
    of_sessions = section("defaults sessions from base")
    assert "no option redispatch" in of_sessions
    (weight,) = re.findall(r'weight (\d+) fall "\$\{RETURNS_WITHIN_S\}"', "\n".join(of_sessions))
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert f"{int(weight) * 16:,} places" in page
    names = section("resolvers names")
    for gone in ("nx", "other", "refused", "timeout"):
        assert f'hold {gone} "${{RETURNS_WITHIN_S}}s"' in names


def test_what_is_of_no_session_goes_to_another_replica_soon() -> None:
    of_none = section("defaults stateless from base")
    assert {"option redispatch 1", "default-server fall 2"} <= set(of_none)
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert "two seconds and a failed connection" in " ".join(page.split())


def test_haproxy_is_asked_how_it_is_where_it_says_so(
    cluster: dict[str, Yaml], kubernetes: dict[tuple[str, str], Yaml]
) -> None:
    (path,) = re.findall(r"^  monitor-uri (\S+)$", HAPROXY, re.MULTILINE)
    given = cluster["haproxy"]["environment"]
    port = int(given["METRICS_BIND"].removeprefix("0.0.0.0:"))
    assert cluster["haproxy"]["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}{path}"
    pod = kubernetes["Deployment", "tamiyo-balancer"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for of in ("readiness", "liveness"):
        assert container[f"{of}Probe"]["httpGet"] == {"path": path, "port": "metrics"}
    ports = {each["name"]: f"0.0.0.0:{each['containerPort']}" for each in container["ports"]}
    of_the_pod = environment_of(container)
    for bind, name in (("BIND", "http"), ("METRICS_BIND", "metrics")):
        assert of_the_pod[bind] == given[bind] == ports[name]


def test_every_replica_steps_with_one_thread(
    cluster: dict[str, Yaml], kubernetes: dict[tuple[str, str], Yaml]
) -> None:
    pod = kubernetes["StatefulSet", "tamiyo"]["spec"]["template"]["spec"]
    given = [of["environment"] for name, of in cluster.items() if name.startswith("tamiyo")]
    given.append(environment_of(pod["containers"][0]))
    assert [each["TAMIYO_NUM_THREADS"] for each in given] == ["1"] * 3
    assert re.findall(r"--num-threads (\S+)", SCRIPT) == ["1"]


def test_a_replica_is_ready_when_it_says_so_and_not_when_an_older_log_does() -> None:
    emptied, begun = SCRIPT.index(': >"$state/$number.log"'), SCRIPT.index('  serve "$number" "$@"')
    assert emptied < begun < SCRIPT.index("grep -q '^ready: '")


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
    for of in replicas.values():
        snapshots = str(Path(of["environment"]["TAMIYO_SNAPSHOT"]).parent)
        assert [volume.partition(":")[2] for volume in of["volumes"]] == [snapshots]
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
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
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
        (spread,) = pod["topologySpreadConstraints"]
        assert spread["labelSelector"] == {
            "matchLabels": kubernetes["Service", name]["spec"]["selector"]
        }


def test_only_who_has_to_reaches_the_replicas_and_the_balancer_reaches_only_them(
    kubernetes: dict[tuple[str, str], Yaml],
) -> None:
    selector = {
        name: {"podSelector": {"matchLabels": kubernetes["Service", name]["spec"]["selector"]}}
        for name in ("tamiyo", "tamiyo-balancer")
    }
    page = (ROOT / "docs" / "scaling.md").read_text()
    (label,) = re.findall(r'pods with the label `(\S+): "true"`', page)
    (namespace,) = re.findall(r"and the namespace `(\S+)`", page)
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    replicas = kubernetes["NetworkPolicy", "tamiyo"]["spec"]
    pushing = {"podSelector": {"matchLabels": {label: "true"}}}
    (allowed,) = replicas["ingress"]
    assert allowed["from"] == [selector["tamiyo-balancer"], pushing, monitoring]
    assert allowed["ports"] == [{"port": "http"}]
    assert replicas["egress"] == []
    balancer = kubernetes["NetworkPolicy", "tamiyo-balancer"]["spec"]
    clients, scrapes = balancer["ingress"]
    assert clients == {"ports": [{"port": "http"}]}
    assert scrapes == {"ports": [{"port": "metrics"}], "from": [monitoring]}
    to_replicas, to_names = balancer["egress"]
    assert to_replicas == {"ports": [{"port": 8000}], "to": [selector["tamiyo"]]}
    assert to_names == {"ports": [{"port": 53, "protocol": by} for by in ("UDP", "TCP")]}
    for name, spec in (("tamiyo", replicas), ("tamiyo-balancer", balancer)):
        assert spec["policyTypes"] == ["Ingress", "Egress"], name
