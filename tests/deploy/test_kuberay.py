"""The manifests, offline: schemas, agreement with the code, and the Serve config on a real Serve."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import app, launch, specs
from deploy.settings import load
from tests.deploy.fakes import RunningApi
from tests.deploy.kubernetes_files import Document, problems, render, with_defaults
from tests.ports import free_port
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parent.parent.parent
KUBERAY = ROOT / "deploy" / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
CRDS = Path(os.environ.get("EXPERTMESH_KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay")
RAY_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
CORE = {"Service", "StatefulSet", "NetworkPolicy", "PersistentVolumeClaim"}


def rayservice(documents: list[Document]) -> Document:
    return next(d for d in documents if d["kind"] == "RayService")


def groups(service: Document) -> dict[str, dict[str, Any]]:
    return {g["groupName"]: g for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def application(service: Document) -> tuple[dict[str, Any], dict[str, Any]]:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config, config["applications"][0]


@functools.cache
def crd_schema() -> dict[str, Any]:
    """The schema of a RayService; the file is large."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load((CRDS / "ray.io_rayservices.yaml").read_bytes(), Loader=loader)
    schema: dict[str, Any] = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return schema


def test_there_is_an_overlay_for_each_size() -> None:
    assert OVERLAYS == ["57b-a14b", "a2.7b", "cpu-demo", "incremental-upgrade"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_rendered_rayservice_fits_the_crd(overlay: str) -> None:
    if not CRDS.is_dir():
        pytest.skip(f"no KubeRay CRDs at {CRDS}; EXPERTMESH_KUBERAY_CRDS may name their folder")
    schema = crd_schema()
    service = rayservice(render(KUBERAY / "overlays" / overlay))
    assert problems(with_defaults(service, schema), schema) == []
    broken = json.loads(json.dumps(service))
    broken["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 1
    del broken["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert len(problems(broken, schema)) == 2, "the validator does see an unknown and a missing field"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_are_valid(overlay: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    seen = set()
    for document in render(KUBERAY / "overlays" / overlay):
        if document["kind"] in CORE:
            validate.validate(document, "1.31", strict=True)
            seen.add(document["kind"])
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": g["template"]["spec"]}
            for g in groups(rayservice(render(KUBERAY / "overlays" / overlay))).values()]  # fmt: skip
    for pod in pods:
        validate.validate(pod, "1.31", strict=True)
    assert {"Service", "StatefulSet", "NetworkPolicy"} <= seen


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_what_our_small_renderer_does(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    path = KUBERAY / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", str(path)], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"kubectl kustomize does not run here: {done.stderr[:200]}")

    def by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
        return {(d["kind"], d["metadata"]["name"]): d for d in documents}

    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(render(path))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_agree_with_the_code(overlay: str, api: RunningApi) -> None:
    documents = render(KUBERAY / "overlays" / overlay)
    service = rayservice(documents)
    config, application_ = application(service)
    module, _, name = application_["import_path"].partition(":")
    assert module == app.__name__ and callable(getattr(app, name))
    assert application_["name"] == app.APP_NAME
    settings = load(flags=application_["args"]).settings  # unknown names would be refused
    specs.router_spec(settings)
    assert {d["name"] for d in application_["deployments"]} <= {"ingress", "router"}

    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["rayVersion"] == __import__("ray").__version__
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["autoscalerOptions"]["version"] == "v2"
    workers = groups(service)
    asked = {"router": (settings.mesh.router_resources, settings.mesh.router_cpus, settings.mesh.router_gpus),
             "expert": (settings.mesh.shard_resources, settings.mesh.shard_cpus, settings.mesh.shard_gpus)}  # fmt: skip
    ingress, offers = settings.server.ingress_resources, {}
    for group, count in (("router", settings.mesh.routers), ("expert", settings.mesh.shards)):
        worker, (resources, cpus, gpus) = workers[group], asked[group]
        offered = json.loads(json.loads(worker["rayStartParams"]["resources"]))
        offers[group] = {name: offered.pop(name) for name in ingress if name in offered}
        assert resources and resources == offered, "one part to a pod"
        requests = worker["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert float(requests["cpu"]) >= cpus and float(requests.get("nvidia.com/gpu", 0)) == gpus
        assert worker["minReplicas"] <= worker["replicas"] == count <= worker["maxReplicas"]
        assert bool(gpus) == ("tolerations" in worker["template"]["spec"])
        spread = worker["template"]["spec"]["topologySpreadConstraints"][0]
        assert spread["labelSelector"]["matchLabels"] == {"ray.io/group": group}
    assert ingress and not offers["expert"], "an ingress with experts would take the CPUs of a shard"
    # A new one is up before an old one goes.
    assert all(2 * settings.server.num_ingresses * n <= offers["router"][name] for name, n in ingress.items())

    router = workers["router"]["template"]["spec"]
    ports = {p["name"]: p["containerPort"] for p in router["containers"][0]["ports"]}
    assert ports["serve"] == config["http_options"]["port"] == 8000
    probe = router["containers"][0]["readinessProbe"]["httpGet"]
    import httpx

    assert httpx.get(api.url + probe["path"], timeout=10).status_code == 200
    drain = max(d["graceful_shutdown_timeout_s"] for d in application_["deployments"])
    for worker in workers.values():
        pod = worker["template"]["spec"]
        environment = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
        ray_waits = float(environment[RAY_DRAIN])
        assert pod["terminationGracePeriodSeconds"] > 10 + ray_waits, "preStop, then the drain"
        assert worker["groupName"] != "router" or ray_waits > drain, "Ray ends what still runs then"

    secrets = {d["metadata"]["name"]: set(d["stringData"])
               for d in yaml.safe_load_all((KUBERAY / "base" / "secrets.example.yaml").read_text())}  # fmt: skip
    text = json.dumps(documents)
    for name, key in re.findall(r'"secretKeyRef": {"key": "([^"]+)", "name": "([^"]+)"', text):
        assert name in secrets[key]
    assert {cluster["authOptions"]["secretName"], "expertmesh-api-keys"} <= set(secrets)
    assert settings.server.api_key_file == "/etc/expertmesh/api-keys/" + next(iter(secrets["expertmesh-api-keys"]))
    for spec in [cluster["headGroupSpec"], *workers.values()]:
        pod = spec["template"]["spec"]
        assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"] and pod["restartPolicy"] == "Never"
        for variable in pod["containers"][0]["env"]:
            if variable["name"].startswith("EXPERTMESH_"):
                load(environ={variable["name"]: "x"})
    policy = next(d for d in documents if d["kind"] == "NetworkPolicy")
    assert (
        policy["spec"]["podSelector"]["matchLabels"].items()
        <= workers["router"]["template"]["metadata"]["labels"].items()
    )
    monitoring = list(yaml.safe_load_all((KUBERAY / "monitoring.yaml").read_text()))
    scrape = next(d for d in monitoring if d["kind"] == "ScrapeConfig")["spec"]
    assert httpx.get(api.url + scrape["metricsPath"], timeout=10).status_code == 200


def test_the_upgrade_variant_differs_in_its_strategy_alone() -> None:
    plain, careful = (rayservice(render(KUBERAY / "overlays" / o)) for o in ("cpu-demo", "incremental-upgrade"))
    strategy = careful["spec"].pop("upgradeStrategy")
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert careful == plain


SERVE = """
import json, os, signal, sys, time, urllib.request, ray, yaml
from actors.processes import descendants, end
from ray import serve
from ray.serve.schema import ServeDeploySchema
from ray.serve.context import _get_global_client

def answer():
    config = yaml.safe_load(sys.stdin.read())
    ray.init(address="local", num_cpus=8, resources={"router_slot": 2, "expert_slot": 4, "ingress_slot": 4},
             include_dashboard=False, log_to_driver=False, logging_level=50, _node_ip_address="127.0.0.1")
    serve.start(http_options=config["http_options"], proxy_location=config["proxy_location"])
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
    for _ in range(600):
        status = serve.status().applications["expertmesh"]
        if status.status == "RUNNING":
            break
        assert status.status != "DEPLOY_FAILED", status
        time.sleep(0.2)
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    head = {"Authorization": "Bearer sk-k8s", "Content-Type": "application/json"}
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}).encode()
    asked = urllib.request.Request(url + "/v1/completions", body, head)
    for _ in range(100):
        try:
            with urllib.request.urlopen(asked, timeout=60) as said:
                print("ANSWER", said.read().decode())
            break
        except OSError:
            time.sleep(0.2)
    with urllib.request.urlopen(urllib.request.Request(url + "/mesh", headers=head), timeout=10) as said:
        print("SHARDS", len(json.load(said)["shards"]))
    deployments = {n: d.replica_states for n, d in serve.status().applications["expertmesh"].deployments.items()}
    print("DEPLOYMENTS", sorted(deployments))

def too_late(*_):
    sys.exit("no answer came in time")

signal.signal(signal.SIGALRM, too_late)
signal.alarm(240)
try:
    answer()
finally:
    signal.alarm(0)
    below = descendants(os.getpid())
    try:
        ray.shutdown()
    finally:
        end(below, 2.0)
"""


def test_the_serve_config_answers_on_a_real_serve(tmp_path: Path) -> None:
    config, application_ = application(rayservice(render(KUBERAY / "overlays" / "cpu-demo")))
    keys = tmp_path / "keys"
    keys.write_text("sk-k8s\n")
    application_["args"]["model"]["path"] = str(write_tiny_model(tmp_path / "tiny"))  # no weights to fetch here
    application_["args"]["server"]["api_key_file"] = str(keys)
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32,
                   "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SERVE], input=yaml.dump(config), capture_output=True, text=True, timeout=290, cwd=ROOT,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.split("ANSWER ")[1].splitlines()[0])
    assert answer["usage"]["completion_tokens"] == 4
    assert "SHARDS 2" in done.stdout and "DEPLOYMENTS ['ingress', 'router']" in done.stdout


def test_an_ingress_asks_for_its_resources_and_one_machine_offers_them() -> None:
    flags = {"server": {"ingress_resources": {"ingress_slot": 1}, "num_ingresses": 3}}
    ingress: Any = app.build_app(flags)
    assert ingress._bound_deployment.ray_actor_options["resources"] == {"ingress_slot": 1}
    assert launch._custom_resources(load(flags=flags).settings.each_mesh()) == {"ingress_slot": 6}


def test_the_image_is_on_the_same_ray_and_not_root() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    import ray

    assert f"ARG RAY={ray.__version__}" in text and "\nUSER 1000\n" in text
    for source in re.findall(r"^COPY (?!--)(.+) \S+$", text, flags=re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists() or name == "README.md", f"{name} is not in the repository"


def test_nothing_is_deployed_where_ray_asks_nobody_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=token"):
        app.build_app({"mesh": {"shards": 2}})
    app.build_app({"server": {"allow_open_ray": True}, "mesh.shards": 2})
