"""The commands against an API with a fake router: chat, complete, bench, check; no Ray."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy import specs
from deploy.bench import Outcome, summarize
from deploy.bench_load import Workload, arrivals, jobs
from deploy.cli import cli
from deploy.cli_chat import Conversation, converse
from deploy.cli_check import findings, listening, of_node, requirements
from deploy.cli_plan import model_shape
from deploy.cli_status import Snapshot, heat_row, look, one_line, quantile, view
from deploy.http_client import CallError, Client
from deploy.node_report import check_checkpoint, code_hash, node_report
from deploy.service_record import recorded, services
from deploy.settings import Settings, load
from tests.deploy.fakes import RunningApi
from tests.tiny import write_tiny_model


def run(*arguments: str, stdin: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(cli, list(arguments), input=stdin)
    return result.exit_code, result.output


def conversation(api: RunningApi, **options: Any) -> Conversation:
    return Conversation(Client(url=api.url), "tiny", {"max_tokens": 6, "seed": 3}, **options)


def chat_with(talk: Conversation, *lines: str) -> str:
    shown: list[str] = []
    source = iter(lines)

    def read() -> str:
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    converse(talk, read, shown.append)
    return "".join(shown)


def test_a_chat_streams_and_remembers_and_forgets(api: RunningApi) -> None:
    talk = conversation(api, system="be brief")
    shown = chat_with(talk, "hello", "and now?", "/history", "/reset", "/history")
    assert "user: hello" in shown and "user: and now?" in shown and "forgotten" in shown
    assert shown.rstrip().endswith("nothing yet")
    assert talk.messages == [] and talk.system == "be brief"
    sent = api.router.requests[-1]["prompt_ids"]
    assert len(sent) > len(api.router.requests[-2]["prompt_ids"]), "the second question carries the first exchange"


def test_retry_asks_the_last_question_again_and_unknown_commands_show_help(api: RunningApi) -> None:
    talk = conversation(api)
    chat_with(talk, "hello", "/retry")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    assert "/reset" in chat_with(talk, "/nothing")


def test_an_interrupted_answer_stays_in_the_history_as_far_as_it_came(api: RunningApi) -> None:
    talk = conversation(api)
    pieces = talk.ask("hello")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": first}


def test_a_failed_question_is_not_remembered(api: RunningApi) -> None:
    talk = Conversation(Client(url=api.url), "no-such-model", {})
    with pytest.raises(CallError, match="no-such-model"):
        list(talk.ask("hello"))
    assert talk.messages == []


def test_complete_prints_the_text_and_echo_the_prompt(api: RunningApi) -> None:
    code, text = run("complete", "the expert", "--url", api.url, "--max-tokens", "5", "--seed", "1", "--echo")
    assert code == 0 and text.startswith("the expert") and len(text) > len("the expert\n")
    assert run("complete", "-", "--url", api.url, "--max-tokens", "2", stdin="from a pipe")[0] == 0


def test_a_service_that_is_not_there_is_one_line() -> None:
    for name in (["chat"], ["complete", "x"], ["status", "--once"], ["bench", "--num-prompts", "1"]):
        code, text = run(*name, "--url", "http://127.0.0.1:9")
        assert code == 1 and text.count("\n") == 1 and "is it up?" in text


def test_a_service_on_this_machine_is_asked_without_a_proxy(api: RunningApi) -> None:
    command = [sys.executable, "-m", "deploy.cli", "complete", "x", "--max-tokens", "1", "--url", api.url]
    environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    subprocess.run(command, env=environment, check=True, timeout=60)


def test_bench_measures_writes_json_and_draws(api: RunningApi, tmp_path: Path) -> None:
    code, text = run(
        *("bench", "--url", api.url, "--num-prompts", "12", "--request-rate", "200", "--dataset-name", "random"),
        *("--random-input-len", "20", "--random-output-len", "7", "--random-prefix-len", "9", "--result-dir"),
        *(str(tmp_path), "--result-filename", "a.json", "--max-concurrency", "4"),
    )
    assert code == 0, text
    for word in ("TTFT", "TPOT", "ITL", "E2E", "output tokens/s"):
        assert word in text
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] == 12 * 7 and result["total_input_tokens"] == 12 * 29
    assert result["p99_itl_ms"] >= result["p50_itl_ms"] > 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    prompts = [tuple(r["prompt_ids"]) for r in api.router.requests[-12:]]
    assert len({p[:9] for p in prompts}) == 1 and len({p[9:] for p in prompts}) == 12


def test_bench_reports_failures_and_refuses_what_cannot_be(api: RunningApi, tmp_path: Path) -> None:
    base = ["bench", "--url", api.url, "--num-prompts", "1", "--no-plot", "--result-dir", str(tmp_path)]
    assert "not served" in run(*base, "--model", "other")[1]
    code, text = run(*base, "--dataset-name", "x")
    assert code == 2 and "sharegpt" in text and "random" in text
    assert "no room" in run(*base, "--random-prefix-len", "99999")[1]
    assert "above 0" in run(*base, "--request-rate", "0")[1]
    for percents in ("50,101", "a", "", "nan"):
        code, text = run(*base, "--metric-percentiles", percents)
        assert code == 1 and "from 0 to 100" in text
    assert "overwrite" in run(*base, "--result-filename", "x.png")[1]
    assert not list(tmp_path.iterdir())


def test_arrivals_follow_their_rate_and_their_seed() -> None:
    poisson = Workload(num_prompts=4000, rate=50.0)
    times = arrivals(poisson, random.Random(1))
    assert times == arrivals(poisson, random.Random(1)) and times[0] == 0.0
    assert times[-1] == pytest.approx(4000 / 50, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.1), "exponential gaps: as wide as their mean"
    fixed = arrivals(Workload(num_prompts=5, rate=4.0, burstiness=None), random.Random(1))
    assert fixed == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert arrivals(Workload(num_prompts=3), random.Random(1)) == [0.0] * 3


def test_lengths_are_sharegpt_like_and_fit_the_context() -> None:
    work = jobs(Workload(num_prompts=3000, seed=2), range(100), max_model_len=4096)
    prompts = sum(len(j.prompt_ids) for j in work) / 3000
    answers = sum(j.max_tokens for j in work) / 3000
    assert 150 < prompts < 260 and 140 < answers < 240
    tight = jobs(Workload(num_prompts=300), range(100), max_model_len=128)
    assert all(len(j.prompt_ids) + j.max_tokens < 128 for j in tight)


def test_a_summary_counts_good_requests_only() -> None:
    good = Outcome(3, sent=1.0, token_times=[1.5, 1.6, 1.8], output_tokens=3)
    summary = summarize([good, Outcome(3, error="HTTP 503")], 2.0, [25, 50])
    assert (summary["completed"], summary["failed"], summary["output_throughput"]) == (1, 1, 1.5)
    assert summary["p50_ttft_ms"] == pytest.approx(500)
    assert summary["p25_itl_ms"] == pytest.approx(125), "between two values it is linear"
    assert summary["mean_itl_ms"] == summary["mean_tpot_ms"] == pytest.approx(150)


def test_quantiles_come_from_buckets_as_in_prometheus() -> None:
    now = Snapshot(1.0, {}, {"x": {0.1: 5.0, 0.2: 10.0, float("inf"): 10.0}}, {})
    assert quantile(None, now, "x", 0.5) == pytest.approx(0.1)
    assert quantile(None, now, "x", 0.75) == pytest.approx(0.15)
    assert quantile(now, now, "x", 0.5) is None, "nothing came between the two looks"
    assert heat_row([0, 4, 8]) == " ▄█" and len(heat_row([1.0] * 1000)) <= 64


def test_the_status_fits_a_small_terminal_and_shows_any_trouble_as_it_is() -> None:
    shard = {"shard_id": "shard-0", "state": "serving", "host": "192.168.100.10", "pid": 123456, "weight_bytes": 42e8}
    router = {"router_id": "router-es6yjo42", "host": "192.168.100.10", "pid": 4242, "num_steps": 10, "step_s": 0.1}
    mesh = {"epoch": 3, "complete": True, "trouble": "[/not markup]", "shards": [shard], "routers": [router]}
    screen = Console(width=80, file=io.StringIO())
    screen.print(view(Snapshot(0.0, {}, {}, mesh), Snapshot(1.0, {"prefix_cache_queries_total": 1.0}, {}, mesh)))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for whole in ("192.168.100.10 123456", "4.2 GB", "router-es6yjo42 router", "10.0 ms", "[/not markup]"):
        assert whole in text, text
    assert "…" not in text
    now = Snapshot(1.0, {"generation_tokens_total": 40.0, "num_requests_running": 3.0}, {}, mesh)
    line = "40 tokens/s  3 running  0 waiting  KV 0.0 %  1 shards  epoch 3 complete"
    assert one_line(Snapshot(0.0, {}, {}, mesh), now) == line


class TwoMeshes:
    """A client of a service with two meshes."""

    def text(self, path: str) -> str:
        return (
            'expertmesh_num_requests_running{mesh="default",router="a"} 40.0\n'
            'expertmesh_num_requests_running{mesh="default-2",router="b"} 2.0\n'
            "expertmesh_generation_tokens_total 7.0\n"
        )

    def get(self, path: str) -> dict[str, Any]:
        return {"mesh": "default-2" if path.endswith("second") else "default"}


def test_the_status_of_a_model_leaves_other_meshes_out() -> None:
    client: Any = TwoMeshes()
    assert look(client, "second").values == {"num_requests_running": 2.0, "generation_tokens_total": 7.0}
    assert look(client, None).values["num_requests_running"] == 42.0


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"mesh.replicas": 3, "mesh.shards": 2}, "replicas"),
        ({"model.chat_template": "/nowhere"}, "/nowhere"),
        ({"server.api_key_file": "/nowhere"}, "api_key_file"),
    ],
)
def test_check_fails_what_serve_refuses(flags: dict[str, Any], word: str) -> None:
    found = itertools.islice(findings(load(flags=flags).settings, None), 3)  # before it looks at this node
    assert [word in one.detail for one in found if one.level == "fail" and one.subject != "port"] == [True]


def test_a_plan_fetches_nothing_but_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(model: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert (model, allow_patterns) == ("owner/tiny", ["config.json"])
        return str(write_tiny_model(tmp_path / "tiny"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model_shape("owner/tiny", None).num_experts == 8


@pytest.mark.parametrize("flag", ["efficiency", "memory", "bandwidth", "flops", "network", "tpot", "mtbf"])
@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_plan_needs_devices_and_targets_above_zero(flag: str, value: str) -> None:
    code, text = run("plan", "demo", f"--{flag}", value)
    assert code == 1 and "must be above 0" in text


def test_the_demo_can_be_planned_for() -> None:
    code, text = run("plan", "demo", "--devices", "2")
    assert code == 0 and "Computed, not measured" in text


def test_a_checkpoint_is_whole_or_named_what_it_lacks(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    assert check_checkpoint(model)["experts"] > 0
    weights = next(model.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated"):
        check_checkpoint(model)


def test_each_node_looks_for_a_hub_id_in_its_own_cache(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    snapshot = there / "models--owner--tiny" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    write_tiny_model(snapshot)
    (there / "models--owner--tiny" / "refs").mkdir()
    (there / "models--owner--tiny" / "refs" / "main").write_text("a" * 40)
    settings = Settings.model_validate({"model": {"path": "owner/tiny", "download_dir": str(there)}})
    model = specs.model_everywhere(settings)
    assert model == ("owner/tiny", None, str(there))
    found = node_report([model])
    assert found["checkpoints"] and not found["checkpoint_errors"] and not found["not_fetched"]
    missing = node_report([("owner/tiny", None, str(here))])
    assert missing["not_fetched"] == ["owner/tiny"] and not missing["checkpoint_errors"]
    assert ("warn", "owner/tiny") in [(f.level, f.detail.split()[0]) for f in of_node("n", missing, missing)]
    directory = specs.model_everywhere(Settings.model_validate({"model": {"path": str(snapshot)}}))
    assert directory[0] == str(snapshot.resolve())


def test_other_code_and_other_versions_on_a_node_are_found() -> None:
    here = {
        "versions": {"ray": "2.60.0"}, "code": code_hash(), "cpus": 2, "vectors": "avx2", "gpus": [],
        "memory_bytes": 10**9, "kernels": "native", "checkpoints": [], "checkpoint_errors": [],
        "not_fetched": [],
    }  # fmt: skip
    assert {f.level for f in of_node("n", here, here)} == {"ok"}
    other = {**here, "code": "x", "versions": {"ray": "2.9"}, "checkpoint_errors": ["gone"]}
    assert [f.level for f in of_node("n", other, here)] == ["ok", "fail", "fail", "fail"]
    assert requirements().level == "ok"
    assert [listening("0.0.0.0", 0, has_keys=has_keys).level for has_keys in (False, True)] == ["warn", "ok"]


def test_down_finds_only_services_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert services() == []
    with recorded("http://127.0.0.1:1", 1):
        assert [s.url for s in services()] == ["http://127.0.0.1:1"]
    directory = next(tmp_path.iterdir())
    (directory / "2.json").write_text('{"url": "u", "pid": 1, "started": 5}')
    assert services() == [] and not (directory / "2.json").exists()
    directory.chmod(0o777)
    with pytest.raises(ValueError, match="open to others"):
        services()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))  # as after a logout
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with recorded("http://127.0.0.1:3", 3):
        assert [s.url for s in services()] == ["http://127.0.0.1:3"]


@pytest.mark.parametrize(
    ("flags", "word"), [(("--name", "one"), "--address"), (("--address", "auto", "--port", "8000"), "--port")]
)
def test_down_ends_nothing_where_its_flags_contradict(
    flags: tuple[str, ...], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a service was ended"))
    with recorded("http://127.0.0.1:1", 1):
        code, text = run("down", *flags)
    assert code == 1 and word in text


def test_options_that_are_not_given_leave_the_settings_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("{server: {api_keys: [secret]}, model: {served_names: [whale]}, mesh: {shards: 3}}")
    code, output = run("serve", "--config", str(file), "--print-config")
    assert code == 0
    for name in ("server.api_keys", "model.served_names", "mesh.shards"):
        assert any(line.startswith(name + " ") and f"file {file}" in line for line in output.splitlines()), name
