"""A live service as its operator meets it: metrics and dashboard, ports, doors without a key, commands, the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.processes import descendants
from deploy.auth import OPEN_PATHS
from tests.deploy.otlp import Receiver, attributes, receiver
from tests.e2e.conftest import CONTEXT, LONG, ROOT, Service, start_service
from tests.tiny import write_tiny_model
from tests.waiting import wait_until

KEY = "sk-operator"
SECRET = "zebra"


@pytest.fixture(scope="module")
def collector() -> Iterator[Receiver]:
    with pytest.MonkeyPatch.context() as patch, receiver() as received:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")  # a standard setting: send soon
        yield received


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, collector: Receiver) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("operating")
    model = write_tiny_model(directory / "tiny", max_position_embeddings=CONTEXT)
    keys = directory / "keys"
    keys.write_text(f"# ours\n{KEY}\n")
    watched = ["--log-format", "json", "--otlp-traces-endpoint", collector.url]
    arguments = [str(model), "--shards", "2", "--api-key-file", str(keys), *watched]
    running = start_service(arguments, directory / "serve.log")
    yield running
    if running.process.poll() is None:
        running.stop()


def ask(service: Service, path: str, body: dict[str, Any] | None = None, key: str | None = KEY) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(service.url + path, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def command(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EXPERTMESH_URL": service.url, "EXPERTMESH_API_KEY": KEY, "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip


def test_every_query_of_the_dashboard_names_metrics_that_a_live_service_emits(service: Service) -> None:
    status, _ = ask(service, "/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True})
    assert status == 200
    status, text = ask(service, "/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    emitted = {sample.name: set(sample.labels) for family in families.values() for sample in family.samples}
    dashboard = json.loads((ROOT / "deploy/grafana/expertmesh.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [one["expr"] for one in dashboard["annotations"]["list"]]
    assert len(queries) > 40
    for query in queries:
        names = re.findall(r"expertmesh_\w+", query)
        assert names, query
        for name in names:
            assert name in emitted, f"{query}: the service emits no {name}"
        for labels in re.findall(r"by \(([\w, ]+)\)", query):
            for label in labels.split(", "):
                assert any(label in emitted[name] for name in names), f"{query}: no label {label}"
    assert all(family.documentation for family in families.values())


def test_metrics_count_what_was_asked(service: Service) -> None:
    def total(name: str, **labels: str) -> float:
        text = ask(service, "/metrics")[1]
        return sum(
            s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if s.name == f"expertmesh_{name}" and labels.items() <= s.labels.items()
        )

    names = ["generation_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_count", "rank_pairs_total"]
    before = {name: total(name) for name in names}
    done = total("request_success_total", finished_reason="length")
    ask(service, "/v1/completions", {"prompt": [9, 8, 7, 6], "max_tokens": 5, "ignore_eos": True, "n": 2})
    after = {name: total(name) for name in names}
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 10
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 8
    assert after["time_to_first_token_seconds_count"] - before["time_to_first_token_seconds_count"] == 2
    assert after["rank_pairs_total"] > before["rank_pairs_total"]
    assert total("request_success_total", finished_reason="length") - done == 2
    refused = total("rejected_requests_total", code="invalid_api_key")
    assert ask(service, "/v1/models", key="wrong")[0] == 401
    assert total("rejected_requests_total", code="invalid_api_key") == refused + 1


def test_rays_own_agent_tells_the_same_metrics(service: Service) -> None:
    families = text_string_to_metric_families(ask(service, "/metrics")[1])
    names = {sample.name for family in families for sample in family.samples}
    agent = next(p.pid for p in descendants(service.process.pid) if b"DashboardAgent" in command_line(p.pid))

    def told() -> set[str]:
        texts = [http_get(port, "/metrics") for port in ports_of(agent)]
        return {
            f"expertmesh_{name}" for text in texts for name in re.findall(r"^ray_expertmesh_(\w+)", text, re.MULTILINE)
        }

    wait_until(lambda: told() >= names)
    assert told() == names


def test_every_route_is_closed_without_a_key(service: Service) -> None:
    document = json.loads(ask(service, "/openapi.json")[1])
    doors = [(path, method) for path, methods in document["paths"].items() for method in methods]
    doors += [(path, "get") for path in ("/openapi.json", "/docs", "/redoc", "/nothing", "/v1")]
    assert len(doors) > 30
    for path, method in doors:
        path = path.replace("{name}", "tiny").replace("{model}", "tiny")
        status, text = ask(service, path, {} if method == "post" else None, None)
        if path in OPEN_PATHS:
            assert status == 200, path
        else:
            assert status == 401 and KEY not in text, f"{method} {path}: {status}"
    for key in ("", "sk-operatof", KEY + "x", KEY[:-1]):
        assert ask(service, "/v1/completions", {"prompt": "x"}, key)[0] == 401


def test_health_and_readiness_and_the_page_need_no_key_and_tell_nothing(service: Service) -> None:
    assert ask(service, "/health", key=None) == (200, "")
    status, text = ask(service, "/ready", key=None)
    assert (status, set(json.loads(text))) == (200, {"routers"})
    assert ask(service, "/", key=None)[0] == 200


def test_the_link_port_refuses_whoever_lacks_the_mesh_token(service: Service) -> None:
    router = json.loads(ask(service, "/mesh")[1])["routers"][0]
    for hello in ({}, {"op": "hello", "token": ""}, {"op": "hello", "token": None}, {"op": "hello", "token": "x"}):
        with socket.create_connection((router["host"], router["port"]), timeout=5) as link:
            link.sendall(json.dumps(hello).encode() + b"\n" + b'{"op":"command","request_id":"1","name":"stats"}\n')
            answer = b""
            while part := link.recv(4096):
                answer += part
        assert json.loads(answer)["op"] == "refused"


def test_every_port_of_ray_refuses_whoever_lacks_its_token(service: Service) -> None:
    environment = Path(f"/proc/{descendants(service.process.pid)[0].pid}/environ").read_bytes().split(b"\0")
    token = next(v.partition(b"=")[2].decode() for v in environment if v.startswith(b"RAY_AUTH_TOKEN="))
    assert len(token) >= 32
    refused = set()
    for port in {int(address.rpartition(":")[2], 16) for address in open_ports(service)}:
        greeting = first_bytes(port)
        if greeting.startswith(b"HTTP/"):  # our API, Ray's agents, and metrics, which are for whoever is on this host
            assert port == int(service.url.rpartition(":")[2]) or b" 401 " in greeting or http_get(port, "/metrics")
        elif greeting[3:4] == b"\x04":  # gRPC begins with its settings
            for method in RPCS:
                codes = {call(f"127.0.0.1:{port}", method, wrong) for wrong in (None, "0" * 64, token[:-1])}
                assert len(codes) == 1 and codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
                if grpc.StatusCode.UNAUTHENTICATED in codes:
                    refused.add(method)
                    assert call(f"127.0.0.1:{port}", method, token) != grpc.StatusCode.UNAUTHENTICATED
    assert refused == set(RPCS)


# What the head, a node, a worker and (between replicas) Serve answer.
RPCS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.serve.ASGIService/HandleRequestWithRejection",
)


def call(address: str, path: str, token: str | None) -> grpc.StatusCode | None:
    """An empty gRPC request; None when it is answered."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(path)(b"", metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined]
    return None


def first_bytes(port: int) -> bytes:
    """What a listener says to a request of HTTP/1; nothing where it waits for something else."""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            return stranger.recv(64)
        except OSError:
            return b""


def http_get(port: int, path: str) -> str:
    """The body, or nothing."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError, HTTPException):
        return ""


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def open_ports(service: Service) -> list[str]:
    return listening({process.pid for process in descendants(service.process.pid)} | {service.process.pid})


def ports_of(pid: int) -> list[int]:
    return [int(address.rpartition(":")[2], 16) for address in listening({pid})]


def listening(pids: set[int]) -> list[str]:
    """The processes' listening sockets as /proc/net/tcp writes them, address:port in hexadecimal."""
    inodes = {
        link.split("[")[1].rstrip("]")
        for pid in pids
        for entry in Path(f"/proc/{pid}/fd").iterdir()
        if (link := _readlink(entry)).startswith("socket:")
    }
    lines = [line.split() for t in ("tcp", "tcp6") for line in Path(f"/proc/net/{t}").read_text().splitlines()[1:]]
    return [fields[1] for fields in lines if fields[3] == "0A" and fields[9] in inodes]


def is_loopback(address: str) -> bool:
    return address.partition(":")[0] in ("0100007F", "0000000000000000FFFF00000100007F")


def test_everything_listens_on_loopback_but_serves_token_guarded_port_between_replicas(service: Service) -> None:
    ports = open_ports(service)
    elsewhere = [port for port in ports if not is_loopback(port)]
    ours = descendants(service.process.pid)
    replicas = sum(b"ServeReplica" in command_line(p.pid) for p in ours)
    assert replicas == 2 and len(ports) > 10
    assert len(elsewhere) <= replicas, elsewhere


def _readlink(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def test_the_commands_work_on_a_live_service(service: Service) -> None:
    done = command(service, "status", "--once")
    assert done.returncode == 0, done.stderr
    for words in ("complete", "shard-0", "shard-1", "tokens/s", "TTFT p50", "tokens by layer and expert"):
        assert words in done.stdout, done.stdout
    assert command(service, "scale", "2").stdout == "2 shards\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:  # a low port is not refused to root everywhere
        done = command(service, "check", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "fail" in done.stdout, done.stdout


def test_a_recovery_is_in_the_trace_of_the_request_that_it_held_up(service: Service, collector: Receiver) -> None:
    body = json.dumps({"prompt": SECRET, "max_tokens": LONG, "ignore_eos": True, "stream": True}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", "X-Request-Id": "held-up"}
    victim = json.loads(ask(service, "/mesh")[1])["shards"][0]["pid"]
    request = urllib.request.Request(service.url + "/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.headers.get_all("x-request-id") == ["held-up"]
        answer.readline()
        os.kill(victim, signal.SIGKILL)
        assert [line for line in answer if line.strip()][-1] == b"data: [DONE]\n"

    def roots(spans: list[Any]) -> list[Any]:
        return [s for s in spans if attributes(s).get("expertmesh.request_id") == "held-up"]

    (root,) = roots(collector.wait_for(lambda spans: bool(roots(spans))))
    children = {span.name: span for span in collector.spans if span.parent_span_id == root.span_id}
    assert {"queue", "prefill", "decode", "recovery"} <= set(children)
    recovery, decode = children["recovery"], children["decode"]
    assert decode.start_time_unix_nano <= recovery.start_time_unix_nano < recovery.end_time_unix_nano
    assert recovery.end_time_unix_nano <= decode.end_time_unix_nano
    wait_until(lambda: bool(json.loads(ask(service, "/mesh")[1])["settled"]), 90)


def test_every_part_logs_json_and_nobody_logs_a_prompt(service: Service) -> None:
    def whole_lines() -> list[str]:
        return service.log.read_text().rpartition("\n")[0].splitlines()

    wait_until(lambda: any("expertmesh.access" in one and '"held-up"' in one for one in whole_lines()))
    lines = [json.loads(line) for line in whole_lines()]
    parts = {line["part"].partition("-")[0] for line in lines}
    assert {"serve", "ingress", "router", "supervisor"} <= parts
    (access,) = [one for one in lines if one.get("request_id") == "held-up" and one["logger"] == "expertmesh.access"]
    assert access["status"] == 200 and access["output_tokens"] == LONG
    session = next(
        Path(part.decode().partition("session_dir=")[2])
        for process in descendants(service.process.pid)
        for part in command_line(process.pid).split(b"\0")
        if b"session_dir=" in part
    )
    files = [path for path in (session / "logs").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in [*files, service.log] if SECRET.encode() in path.read_bytes()] == []


@pytest.fixture(scope="module")
def browser(service: Service) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
        pytest.skip("no chromium and chromedriver here (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    driver.get(service.url + "/")
    key = driver.find_element("id", "key")
    key.send_keys(KEY)
    driver.execute_script("arguments[0].dispatchEvent(new Event('change'))", key)
    wait(driver, lambda: driver.find_element("id", "model").get_attribute("value"))
    yield driver
    driver.quit()


def wait(driver: Any, condition: Any, seconds: float = 30.0) -> Any:
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        return WebDriverWait(driver, seconds).until(lambda _: condition())
    except TimeoutException as error:
        shown = driver.find_element("tag name", "body").text
        raise AssertionError(f"after {seconds} s the page showed: {shown}") from error


def bubbles(driver: Any) -> list[Any]:
    return list(driver.find_elements("css selector", ".said"))


def test_a_chat_streams_into_the_page_can_be_stopped_and_started_anew(browser: Any) -> None:
    browser.find_element("id", "temperature").send_keys("0")  # drawing from random weights may begin with the end
    browser.find_element("id", "text").send_keys("the whale\n")
    wait(browser, lambda: len(bubbles(browser)) == 2 and "first token" in bubbles(browser)[1].text)
    assert bubbles(browser)[0].text == "the whale"
    assert "error" not in bubbles(browser)[1].get_attribute("class")
    browser.find_element("id", "reset").click()
    tokens = browser.find_element("id", "tokens")
    tokens.clear()
    tokens.send_keys(str(LONG))
    browser.find_element("id", "text").send_keys("the sea\n")
    wait(browser, lambda: len(bubbles(browser)) == 2 and bubbles(browser)[1].text)
    assert "error" not in bubbles(browser)[1].get_attribute("class")
    browser.find_element("id", "stop").click()
    wait(browser, lambda: browser.find_element("id", "send").is_enabled())
    browser.find_element("id", "reset").click()
    assert bubbles(browser) == []


def test_new_forgets_what_was_still_being_said_and_an_empty_answer_says_that_it_is_one(browser: Any) -> None:
    browser.find_element("id", "text").send_keys("the storm\n")
    wait(browser, lambda: len(bubbles(browser)) == 2 and bubbles(browser)[1].text)
    browser.find_element("id", "reset").click()
    wait(browser, lambda: browser.find_element("id", "send").is_enabled())
    assert browser.execute_script("return messages.length") == 0
    # The one question below carries a bias that makes the end its first token.
    browser.execute_script("""
        const plain = call;
        call = (path, body, signal) => {
            call = plain;
            return plain(path, { ...body, logit_bias: { 2: 100 } }, signal);
        };
    """)
    browser.find_element("id", "text").send_keys("the end\n")
    wait(browser, lambda: len(bubbles(browser)) == 2 and "finish_reason stop" in bubbles(browser)[1].text)
    browser.find_element("id", "reset").click()


def test_labels_get_their_probabilities(browser: Any) -> None:
    browser.find_element("id", "piece").send_keys("the ship and the storm")
    browser.find_element("id", "labels").send_keys("sea, land")
    browser.find_element("id", "classify").click()
    rows = wait(browser, lambda: browser.find_elements("css selector", "#classes .bar"))
    shares = [float(row.text.split()[-2]) for row in rows]
    assert len(rows) == 2 and sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)


def test_a_killed_shard_is_seen_to_heal(browser: Any) -> None:
    def state() -> str:
        return str(browser.find_element("id", "state").text)

    def cards() -> list[str]:
        return list(browser.execute_script("return [...document.querySelectorAll('.shard')].map(c => c.innerText)"))

    wait(browser, lambda: "complete" in state().lower() and len(cards()) == 2)
    before = cards()
    victim = int(before[0].rpartition("pid ")[2])
    os.kill(victim, signal.SIGKILL)
    wait(browser, lambda: "lost shard" in browser.find_element("id", "history").text, 60)
    wait(
        browser,
        lambda: len(cards()) == 2 and not any(str(victim) in c for c in cards()) and "complete" in state().lower(),
        90,
    )
    browser.find_element("id", "text").send_keys("again\n")
    wait(browser, lambda: len(bubbles(browser)) == 2 and "first token" in bubbles(browser)[1].text, 60)


def test_the_page_loads_nothing_from_elsewhere_and_complains_of_nothing(browser: Any, service: Service) -> None:
    text = (ROOT / "deploy/pages/index.html").read_text()
    assert "http://" not in text and "https://" not in text and " src=" not in text
    urls = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert urls and all(url.startswith(service.url) for url in urls)
    errors = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert [e for e in errors if "401" not in e and "favicon" not in e] == []


def test_down_ends_the_service_and_every_process_of_it(service: Service) -> None:
    below = descendants(service.process.pid)
    done = command(service, "down", "--port", service.url.rpartition(":")[2])
    assert done.returncode == 0, done.stderr
    assert service.url in done.stdout
    assert not [process for process in below if process.is_alive]
    again = command(service, "down", "--port", service.url.rpartition(":")[2])
    assert again.returncode == 1 and "no service of yours" in again.stderr
