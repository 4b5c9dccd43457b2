"""The planner's arithmetic by hand, and its simulation against the arithmetic."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.mesh_simulation import recovery_s, simulate
from cluster.planner import DEVICES, Layout, ModelShape, Targets, evaluate, most_users, plans, step_times
from deploy.cli import cli

QWEN2_57B = ModelShape(
    hidden_size=3584, num_layers=28, num_moe_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, num_experts=64,
    top_k=8, expert_size=2560, shared_size=20480, dense_size=18944, vocab_size=151936,
)  # fmt: skip
SMALL = ModelShape(
    hidden_size=100, num_layers=2, num_moe_layers=2, num_heads=1, num_kv_heads=1, head_dim=100, num_experts=4, top_k=4,
    expert_size=10, shared_size=0, dense_size=0, vocab_size=1,
)  # fmt: skip
A100 = DEVICES["a100-80g"]
IDEAL = replace(A100, bandwidth=1e6, flops=1e30, network=1e30, latency_s=0.0, overhead_s=0.0, efficiency=1.0)


def test_sizes_are_those_of_the_published_model() -> None:
    total = (QWEN2_57B.experts_bytes + QWEN2_57B.router_bytes) / 2
    assert total == pytest.approx(57.4e9, rel=0.01), "the name says 57B"
    active = QWEN2_57B.router_bytes / 2 + 28 * 8 * QWEN2_57B.expert_params
    assert active == pytest.approx(14.2e9, rel=0.03), "and A14B"
    assert QWEN2_57B.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2


def test_a_step_bound_by_memory_is_its_bytes_over_the_bandwidth() -> None:
    times = step_times(SMALL, IDEAL, Layout(routers=1, shards=1), Targets(users=1, context=0, tpot_s=1.0))
    router_bytes = 2 * (4 * 100 * 100 + 100 * 4)  # q, k, v, o and the gate
    expert_bytes = 2 * 4 * 3 * 100 * 10  # all four are hit
    head_bytes = 2 * 100
    assert times.step_s == pytest.approx((2 * router_bytes + 2 * expert_bytes + head_bytes) / 1e6)
    assert times.shard_is_memory_bound and times.network_s < 1e-20


def test_more_shards_more_bandwidth_and_a_longer_context_never_go_the_wrong_way() -> None:
    targets = Targets(users=256, context=2048, tpot_s=0.05)
    steps = [step_times(QWEN2_57B, A100, Layout(routers=2, shards=s), targets).step_s for s in (4, 8, 16, 32)]
    assert steps == sorted(steps, reverse=True)
    fast = step_times(QWEN2_57B, replace(A100, bandwidth=4e12), Layout(routers=2, shards=8), targets)
    slow = step_times(QWEN2_57B, A100, Layout(routers=2, shards=8), replace(targets, context=32768))
    assert fast.step_s < steps[1] < slow.step_s


def test_plans_fit_in_memory_and_the_best_comes_first() -> None:
    targets = Targets(users=256, context=2048, tpot_s=0.06)
    found = plans(QWEN2_57B, A100, targets, 8)
    assert found[0].meets_tpot and all(p.fits for p in found)
    assert all(p.layout.routers + p.layout.shards == 8 for p in found)
    good = [p.tokens_per_s for p in found if p.meets_tpot]
    assert good == sorted(good, reverse=True)
    assert plans(QWEN2_57B, A100, targets, 2) == [], "99 GB of experts don't fit on one of two"
    users = most_users(QWEN2_57B, A100, found[0].layout, targets)
    assert evaluate(QWEN2_57B, A100, found[0].layout, replace(targets, users=users)).meets_tpot
    more = evaluate(QWEN2_57B, A100, found[0].layout, replace(targets, users=users + 1))
    assert not (more.meets_tpot and more.fits)


@pytest.mark.parametrize(
    ("routers", "shards", "users"), [(1, 2, 8), (1, 7, 64), (2, 6, 256), (4, 12, 512), (8, 24, 1024), (16, 48, 2048)]
)
def test_the_simulation_agrees_with_the_arithmetic_where_loads_are_even(routers: int, shards: int, users: int) -> None:
    layout, targets = Layout(routers=routers, shards=shards), Targets(users=users, context=2048, tpot_s=1.0)
    expected = step_times(QWEN2_57B, A100, layout, targets).step_s
    seen = simulate(QWEN2_57B, A100, layout, targets, num_steps=12, num_layers=3)
    # Whole experts don't divide evenly over 12, 24 or 48 shards, nor draws over experts: the fullest shard decides.
    assert 0.8 * expected < seen.step_s[50] < 1.2 * expected * max(1.0, -(-64 // shards) * shards / 64)


def test_the_simulation_repeats_with_its_seed_and_reaches_1000_shards() -> None:
    layout, targets = Layout(routers=20, shards=1000, replicas=16), Targets(users=4000, context=1024, tpot_s=1.0)
    one = simulate(QWEN2_57B, A100, layout, targets, skew=0.6, num_steps=3, num_layers=2, seed=4)
    assert one == simulate(QWEN2_57B, A100, layout, targets, skew=0.6, num_steps=3, num_layers=2, seed=4)
    assert one.tokens_per_s > 0


def test_copies_of_popular_experts_level_a_skewed_load() -> None:
    targets = Targets(users=256, context=512, tpot_s=1.0)
    spread = [
        simulate(
            QWEN2_57B,
            A100,
            Layout(routers=1, shards=32, replicas=r),
            targets,
            skew=1.0,
            num_steps=5,
            num_layers=2,
        )
        for r in (1, 2)
    ]
    assert spread[1].imbalance < 0.7 * spread[0].imbalance


def test_without_a_copy_the_loss_of_a_shard_also_takes_the_read_of_its_experts() -> None:
    once, twice = (Layout(routers=1, shards=6, replicas=replicas) for replicas in (1, 2))
    assert recovery_s(SMALL, twice) == 0.3
    assert recovery_s(SMALL, once) == pytest.approx(0.3 + 2 * 4 * 3 * 100 * 10 * 2 / 6 / 2e9, rel=1e-12)


def test_plan_reads_a_config_alone_and_says_that_it_computed(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "moe_intermediate_size": 2560,
        "shared_expert_intermediate_size": 20480, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 151936,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli, ["plan", str(tmp_path), "--devices", "8", "--users", "200"])
    assert done.exit_code == 0, done.output
    assert "Computed, not measured" in done.output and "bound" in done.output and "simulated" in done.output
    done = CliRunner().invoke(cli, ["plan", str(tmp_path), "--devices", "2"])
    assert done.exit_code == 1 and "can't hold it" in done.output
    assert "choose one of" in CliRunner().invoke(cli, ["plan", str(tmp_path), "--device", "abacus"]).output


def test_two_micro_batches_are_planned_where_the_network_is_slow() -> None:
    targets = Targets(users=128, context=2048, tpot_s=0.05)
    quick, slow = (plans(QWEN2_57B, replace(A100, network=network), targets, 8) for network in (25e9, 5e9))
    assert quick[0].layout.micro_batches == 1 and slow[0].layout.micro_batches == 2
    layouts = [(p.layout.routers, p.layout.shards, p.layout.replicas) for p in slow]
    assert len(set(layouts)) == len(layouts)


def test_more_copies_make_use_of_more_devices_than_there_are_experts() -> None:
    targets = Targets(users=32_000, context=2048, tpot_s=0.05)
    best = plans(QWEN2_57B, A100, targets, 1020)[0]
    assert best.layout.shards > 900 and best.layout.replicas == 16
    assert best.tokens_per_s > 5 * plans(QWEN2_57B, A100, targets, 1020, replicas=(1, 2))[0].tokens_per_s


def test_the_worked_examples_in_the_docs_are_what_plan_says() -> None:
    text = (Path(__file__).parent.parent.parent / "deploy" / "README.md").read_text()
    numbers = r"\| (\d+) x A100 80 GB \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) ms \| ([\d,]+) \| ([\d,]+) \| ([\w ]+) \|"
    rows = [(*(int(part.replace(",", "")) for part in row[:7]), row[7]) for row in re.findall(numbers, text)]
    assert [row[0] for row in rows] == [8, 64]
    for devices, users, routers, shards, step_ms, rate, uneven_rate, bound_by in rows:
        targets = Targets(users=users, context=2048, tpot_s=0.05)
        best = plans(QWEN2_57B, A100, targets, devices)[0]
        assert (best.layout.routers, best.layout.shards, best.times.bound_by) == (routers, shards, bound_by)
        assert best.times.step_s == pytest.approx(step_ms / 1e3, rel=0.03)
        assert best.tokens_per_s == pytest.approx(rate, rel=0.03)
        seen = simulate(QWEN2_57B, A100, best.layout, targets, skew=0.5, num_steps=30, num_layers=4)
        assert seen.tokens_per_s == pytest.approx(uneven_rate, rel=0.03)


def test_the_shared_expert_hides_the_shards_as_far_as_it_goes() -> None:
    one, targets = Layout(routers=1, shards=1), Targets(users=1, context=0, tpot_s=1.0)
    expert_s = step_times(SMALL, IDEAL, one, targets).shard_s
    small, large = (replace(SMALL, shared_size=size) for size in (20, 400))  # 40 experts are 400 wide
    alone_s = step_times(SMALL, IDEAL, one, targets).step_s
    assert step_times(small, IDEAL, one, targets).step_s == pytest.approx(alone_s), "hidden behind 4 experts of 10"
    hidden = step_times(large, IDEAL, one, targets)
    assert hidden.step_s == pytest.approx(alone_s - expert_s + hidden.shared_s), "it takes longer than they do"
    local = step_times(large, IDEAL, Layout(routers=1, shards=0), targets)
    assert local.step_s == pytest.approx(alone_s + hidden.shared_s), "one process does one after the other"


def test_processes_of_one_host_share_its_cores_and_its_bandwidth() -> None:
    targets = Targets(users=64, context=0, tpot_s=1.0)
    host = replace(IDEAL, host_cores=2)
    apart, together = (
        [step_times(QWEN2_57B, device, Layout(routers=1, shards=s), targets).step_s for s in (1, 2, 4, 8)]
        for device in (IDEAL, host)
    )
    assert apart == sorted(apart, reverse=True), "each shard brings a core"
    assert together[0] == pytest.approx(apart[0]) and together[3] > 0.9 * together[1], "beyond the cores it brings none"
    narrow = replace(host, host_bandwidth=IDEAL.bandwidth)  # two processes get half each
    layout = Layout(routers=1, shards=2)
    assert step_times(QWEN2_57B, narrow, layout, targets).step_s > 1.5 * together[1]


def test_reading_and_computing_add_up_where_they_do_not_overlap() -> None:
    device = replace(IDEAL, bandwidth=10.0, flops=5.0)
    assert device.work_s(100, 100) == 20.0
    assert replace(device, overlap=0.0).work_s(100, 100) == 30.0
    assert replace(device, host_cores=2, host_bandwidth=10.0).work_s(100, 0, num_busy=3) == 20.0


def test_the_fullest_shard_has_more_than_the_mean_while_few_experts_are_drawn() -> None:
    draw = random.Random(0)
    tokens = [draw.sample(range(60), 4) for _ in range(4000)]
    fullest = sum(max(sum(e % 2 == s for e in token) for s in (0, 1)) for token in tokens) / len(tokens)
    model = replace(SMALL, num_experts=60, top_k=4)
    one = Targets(users=1, context=0, tpot_s=1.0)
    seen = step_times(model, IDEAL, Layout(routers=1, shards=2), one).shard_s
    expert_s = 2 * 2 * model.expert_params / 1e6  # of two layers
    assert seen == pytest.approx(fullest * expert_s, rel=0.05)
