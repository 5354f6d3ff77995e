"""launch/k8s/serve.yaml and the lines around it say what the server and Kubernetes take."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from turnout.inference.server.app import ROUTES
from turnout.inference.server.hosts import Hosts
from turnout.inference.server.lifecycle import ABORT_SECONDS
from turnout.inference.server.shell import OPEN
from turnout.launch.cli import parse
from turnout.launch.serve import ServeOptions
from turnout.tests.helpers.served_run import make_run

KEY = "0123456789abcdef"
PATHS = {path for method, path, _ in ROUTES if method == "GET"}
WORDS = "The list of the things that are imported."


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    """Kind → object."""
    text = (Path(__file__).parents[2] / "launch" / "k8s" / "serve.yaml").read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def pod(objects) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def server(pod) -> dict[str, Any]:
    (container,) = pod["containers"]
    return container


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Any]]:
    """The YAML that docs/scale.md shows."""
    text = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


@pytest.fixture(scope="module")
def metrics() -> list[str]:
    """What the server exports."""
    surfaces = Path(__file__).parents[1] / "arch" / "surfaces.json"
    return json.loads(surfaces.read_text(encoding="utf-8"))["server metrics"]


def environment(server: dict[str, Any]) -> dict[str, str]:
    """As the container gets it, in a namespace `here`."""
    sources = {variable["name"]: "".join(variable.get("valueFrom", {})) for variable in server["env"]}
    given = {"secretKeyRef": KEY, "fieldRef": "here"}
    return {variable["name"]: variable.get("value") or given[sources[variable["name"]]] for variable in server["env"]}


def arguments(server: dict[str, Any]) -> list[str]:
    """As the container gets them: $(NAME) is the variable's value."""
    given = environment(server)
    return [re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], argument) for argument in server["args"]]


def options(server: dict[str, Any]) -> ServeOptions:
    return parse(ServeOptions, arguments(server), words=["ckpt"])[1]


@pytest.mark.parametrize("version", ["1.27.0", kubernetes_validate.latest_version()])
def test_kubernetes_takes_every_object(objects, version):
    assert set(objects) == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    for found in objects.values():
        kubernetes_validate.validate(found, version, strict=True)
    wrong = objects["Service"] | {"spec": objects["Service"]["spec"] | {"prots": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_server_takes_its_arguments(server):
    assert server["command"] == ["turnout", "serve"]
    asked = options(server)
    assert asked.api_key == KEY
    assert asked.host == "0.0.0.0"  # noqa: S104 (a pod's own address)
    assert KEY not in str(server), "the key comes from the secret alone"


def test_ports_and_probes_are_the_servers(objects, server):
    (port,) = server["ports"]
    assert port["containerPort"] == options(server).port
    (outer,) = objects["Service"]["spec"]["ports"]
    assert outer["targetPort"] == port["name"]
    probes = {name: server[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health", "liveness": "/health", "readiness": "/ready",
    }  # fmt: skip
    assert {probe["path"] for probe in probes.values()} <= set(OPEN) & PATHS, "without a key"


def test_clients_and_probes_may_call_it_by_what_they_know(objects, server):
    asked = options(server)
    hosts = Hosts(asked.host, asked.allowed_hosts)
    name = objects["Service"]["metadata"]["name"]
    for host in (name, f"{name}.here", f"{name}.here.svc", f"{name}.here.svc.cluster.local", "10.1.2.3:8000"):
        assert hosts.allow(host, None), host
    assert not hosts.allow("elsewhere.example", None)


def test_a_pod_has_the_time_that_its_end_takes(pod, server):
    sleep, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    readiness = server["readinessProbe"]
    assert int(seconds) >= readiness["periodSeconds"] * readiness["failureThreshold"]
    needed = int(seconds) + options(server).drain_seconds + 2 * ABORT_SECONDS
    assert needed < pod["terminationGracePeriodSeconds"] <= needed + 30


def test_everything_points_at_the_same_pods(objects):
    deployment = objects["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"], "kind": "Deployment", "name": deployment["metadata"]["name"],
    }  # fmt: skip
    assert "replicas" not in deployment["spec"], "each apply would undo the autoscaler"
    assert objects["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > 1, "or a disruption leaves nobody"


def test_a_pod_can_do_nothing_but_serve(pod, server):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    own = server["securityContext"]
    assert (own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"]) == (True, False)
    assert own["capabilities"] == {"drop": ["ALL"]}
    kept = {"persistentVolumeClaim", "emptyDir"}
    volumes = {volume["name"]: (set(volume) & kept).pop() for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert set(mounts) == set(volumes)
    assert mounts["models"]["readOnly"] is True
    assert arguments(server)[0].startswith(mounts["models"]["mountPath"] + "/")
    given = environment(server)
    assert {given["HOME"], given["TMPDIR"]} == {mounts["scratch"]["mountPath"]}
    assert given["OMP_NUM_THREADS"] == server["resources"]["requests"]["cpu"]


def test_the_autoscalers_metric_is_one_of_the_server(objects, examples, metrics):
    (metric,) = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = next(example["rules"]["custom"] for example in examples if "rules" in example)
    series = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])[1]
    named = rule["name"]["as"].replace("$1", r"\1")
    made = {re.sub(rule["name"]["matches"], named, name) for name in metrics if re.match(series, name)}
    assert metric["pods"]["metric"]["name"] in made


def test_prometheus_scrapes_the_port_with_the_key(examples, server):
    (monitor,) = (example for example in examples if example.get("kind") == "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == server["ports"][0]["name"]
    assert endpoint["path"] in PATHS
    (secret,) = (source for variable in server["env"] if (source := variable.get("valueFrom", {}).get("secretKeyRef")))
    assert endpoint["authorization"]["credentials"] == secret


@pytest.mark.full
def test_the_command_serves_where_only_its_volumes_can_be_written(server, tmp_path):
    """The container's command, environment and paths, in a place where HOME and TMPDIR are all there is."""
    make_run(tmp_path / "models")
    (tmp_path / "scratch").mkdir()
    here = {"/models": f"{tmp_path}/models", "/scratch": f"{tmp_path}/scratch"}
    given = {name: here.get(value, value) for name, value in environment(server).items()} | {"OMP_NUM_THREADS": "1"}
    local = {"host=0.0.0.0": "host=127.0.0.1", "port=8000": "port=0", "kv_memory_mb=4096": "kv_memory_mb=16"}
    asked = [local.get(argument, argument).replace("/models", here["/models"], 1) for argument in arguments(server)]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", *server["command"], *asked], cwd="/proc", env=kept | given, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        url = next(line for line in process.stdout if line.startswith("ready: ")).split()[1]
        probe = server["readinessProbe"]["httpGet"]["path"]
        assert httpx.get(f"{url}{probe}", trust_env=False).status_code == 200
        assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
        key = {"Authorization": f"Bearer {KEY}"}
        assert "turnout:num_requests_waiting" in httpx.get(f"{url}/metrics", headers=key, trust_env=False).text
        body = {"model": "model", "prompt": WORDS, "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=key, trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
