"""What ingresses count, how they share it, and limits that hold for all of them together."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.ledger import MAX_APART, SILENT_S, Ledger, Totals, add
from actors.metrics import Buckets
from actors.request import Chunk
from deploy.errors import TooManyRequests
from deploy.key_limits import KeyLimits
from deploy.mesh_metrics import MAX_EXPERT_GROUPS, balancedness, mesh_families
from deploy.metrics import ServingMetrics, render
from deploy.ray_metrics import RayMetrics
from deploy.settings import LimitSettings
from tests.deploy.fakes import RunningApi
from tests.waiting import until


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[(sample.name.removeprefix("expertmesh_"), *(value for _, value in sorted(sample.labels.items())))] = (
                sample.value
            )
    return found


def test_a_watch_times_the_first_token_the_gaps_and_the_end() -> None:
    clock = Clock()
    metrics = ServingMetrics(clock)
    timing = [0.1, 0.2]
    with metrics.watch(7, "tiny", {}) as watch:
        for step_s, num_tokens in ((0.3, 1), (0.02, 1), (0.04, 2)):
            clock.now += step_s
            watch.saw(Chunk(request_id="r", token_ids=[5] * num_tokens, timing=timing))
            timing = None
        watch.ended = "length"
    with pytest.raises(RuntimeError), metrics.watch(9, "tiny", {}):
        raise RuntimeError
    with pytest.raises(asyncio.CancelledError), metrics.watch(9, "tiny", {}):
        raise asyncio.CancelledError
    now = samples(render(metrics, {}, {}))
    assert now["time_to_first_token_seconds_sum",] == pytest.approx(0.3)
    assert now["inter_token_latency_seconds_sum",] == pytest.approx(0.04), "two tokens in 40 ms are 20 ms each"
    assert now["e2e_request_latency_seconds_sum",] == pytest.approx(0.36)
    assert now["request_queue_time_seconds_sum",] == pytest.approx(0.1)
    assert now["request_prefill_time_seconds_sum",] == pytest.approx(0.2)
    assert now["request_decode_time_seconds_sum",] == pytest.approx(0.06)
    assert now["request_time_per_output_token_seconds_sum",] == pytest.approx(0.02)
    assert (now["generation_tokens_total",], now["prompt_tokens_total",], now["ingress_requests",]) == (4, 7, 0)
    ended = [now["request_success_total", reason] for reason in ("length", "error", "abort")]
    assert ended == [1, 1, 1]


def test_any_ingress_tells_the_sum_of_all_those_gone_included() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    ingresses = [ServingMetrics(), ServingMetrics()]
    for metrics, tokens in zip(ingresses, (5, 7), strict=True):
        metrics.generation_tokens.inc(tokens)
        metrics.rejected.labels("unusual" if tokens == 7 else "queue_full").inc()
        metrics.running.inc()
    ledger.share("b", ingresses[1].totals())
    others = ledger.share("a", ingresses[0].totals())
    now = samples(render(ingresses[0], others, {}))
    assert now["generation_tokens_total",] == 12 and now["ingress_requests",] == 2
    assert now["rejected_requests_total", "unusual"] == 1, "also a label that this one never used"
    clock.now += SILENT_S + 1
    now = samples(render(ingresses[0], ledger.share("a", ingresses[0].totals()), {}))
    assert now["generation_tokens_total",] == 12, "a counter never falls when an ingress goes"
    assert now["ingress_requests",] == 1, "what runs there is gone"
    for _ in range(2):
        ingresses[1].generation_tokens.inc(1)
        ledger.share("b", ingresses[1].totals())
        clock.now += SILENT_S + 1
    now = samples(render(ingresses[0], ledger.share("a", ingresses[0].totals()), {}))
    assert now["generation_tokens_total",] == 14, "one that was only quiet is counted once"
    for i in range(2 * MAX_APART):
        ledger.share(str(i), ingresses[1].totals())
        clock.now += SILENT_S + 1
        now = samples(render(ingresses[0], ledger.share("a", ingresses[0].totals()), {}))
    assert now["generation_tokens_total",] == 14 + 9 * 2 * MAX_APART, "however many have gone"


def test_sums_add_sample_by_sample() -> None:
    left: Totals = {"f": [("f", {"a": "1"}, 2.0)]}
    right: Totals = {"f": [("f", {"a": "1"}, 3.0), ("f", {"a": "2"}, 1.0)], "g": [("g", {}, 4.0)]}
    assert add(left, right) == {"f": [("f", {"a": "1"}, 5.0), ("f", {"a": "2"}, 1.0)], "g": [("g", {}, 4.0)]}


def test_expert_tokens_have_bounded_cardinality_and_lose_nothing() -> None:
    router = {"router_id": "r", "num_steps": 1, "expert_tokens": {"0": list(range(60)), "3": [1] * 5}}
    now = samples(render(ServingMetrics(), {}, {"routers": [router, {**router, "router_id": "s"}]}))
    layer = {key: value for key, value in now.items() if key[0] == "expert_tokens_total" and key[2] == "0"}
    assert len(layer) <= MAX_EXPERT_GROUPS and sum(layer.values()) == 2 * sum(range(60))
    assert now["expert_tokens_total", "4", "3", "default"] == 2
    assert now["layer_balancedness", "3", "default"] == 1.0
    assert balancedness([4.0, 0.0]) == 0.5 and balancedness([]) == 1.0 == balancedness([0.0, 0.0])


def test_each_mesh_of_several_has_its_own_samples() -> None:
    def mesh(name: str, epoch: int, tokens: int) -> dict[str, Any]:
        shards = [{"shard_id": "shard-0", "state": "serving", "tokens": tokens, "pairs": 1}]
        return {"mesh": name, "epoch": epoch, "complete": True, "shards": shards, "routers": []}

    both = {**mesh("one", 3, 10), "further_meshes": {"two": mesh("two", 5, 20)}}
    now = samples(render(ServingMetrics(), {}, both))
    assert (now["epoch", "one"], now["epoch", "two"]) == (3, 5)
    assert (now["rank_tokens_total", "one", "shard-0"], now["rank_tokens_total", "two", "shard-0"]) == (10, 20)


def test_rays_gauges_are_called_as_the_samples_and_fall_to_zero_when_their_part_is_gone() -> None:
    told: dict[tuple[str, ...], float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.tag_keys
            told[self.name.removeprefix("expertmesh_"), *(value for _, value in sorted(tags.items()))] = value

    metrics, ray_metrics = ServingMetrics(), RayMetrics(Gauge, with_mesh=True)
    metrics.ttft.observe(0.3)
    router = {"router_id": "r", "running": 2, "num_steps": 9}
    ray_metrics.publish([*metrics.families({}), *mesh_families({"routers": [router]})])
    assert told == samples(render(metrics, {}, {"routers": [router]}))
    ray_metrics.publish([*metrics.families({}), *mesh_families({"routers": []})])
    assert told["num_requests_running", "default", "r"] == 0
    assert told["steps_total", "default", "r"] == 9, "a counter stays"


def test_a_routers_histogram_reads_as_prometheus_does() -> None:
    spent = Buckets((0.1, 0.2))
    for value in (0.05, 0.1, 0.15, 5.0):
        spent.observe(value)
    part = {"dispatch_s": spent.to_dict(), "combine_s": spent.to_dict(), "dispatch_bytes": 9, "combine_bytes": 8}
    now = samples(render(ServingMetrics(), {}, {"routers": [{"router_id": "r", "num_steps": 1, "exchange": part}]}))
    assert now["dispatch_seconds_bucket", "0.1", "default", "r"] == 2
    assert now["dispatch_seconds_bucket", "0.2", "default", "r"] == 3
    assert now["dispatch_seconds_bucket", "+Inf", "default", "r"] == 4 == now["dispatch_seconds_count", "default", "r"]
    assert now["dispatch_bytes_total", "default", "r"] == 9


def test_the_endpoint_works_when_nothing_but_the_ingress_is_known(api: RunningApi) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
    assert httpx.post(api.url + "/v1/completions", json=body, timeout=30).status_code == 200
    answer = httpx.get(api.url + "/metrics", timeout=30)
    assert answer.headers["content-type"].startswith("text/plain")
    assert samples(answer.content)["generation_tokens_total",] >= 4


def test_a_key_has_a_rate_and_a_number_at_once() -> None:
    clock = Clock()
    ledger = Ledger(clock)

    def admit(key: str, request_id: str) -> str:
        return ledger.admit(key, request_id, per_minute=60, at_once=2, lease_s=30.0)[0]

    assert [admit("k", str(i)) for i in range(3)] == ["", "", "concurrency"]
    assert admit("other", "x") == "", "one key's use is nobody else's"
    ledger.release("k", "0")
    assert admit("k", "3") == ""
    clock.now += 31
    assert admit("k", "4") == "", "a lease ends by itself: its ingress may have died"
    assert [ledger.admit("r", str(i), per_minute=2, at_once=None, lease_s=1)[0] for i in range(3)] == ["", "", "rate"]
    clock.now += 29
    refused, wait_s = ledger.admit("r", "4", per_minute=2, at_once=None, lease_s=1)
    assert refused == "rate" and wait_s == pytest.approx(1.0)
    clock.now += 1.1
    assert ledger.admit("r", "5", per_minute=2, at_once=None, lease_s=1)[0] == ""
    for per_minute in (None, 2, 2):
        assert ledger.admit("new", str(per_minute), per_minute=per_minute, at_once=9, lease_s=1)[0] == ""
    assert ledger.admit("new", "4", per_minute=2, at_once=9, lease_s=1)[0] == "rate"


class Shared:
    """A ledger that two ingresses reach; `is_up` False makes every call fail."""

    def __init__(self) -> None:
        self.ledger = Ledger(lambda: 0.0)
        self.is_up = True
        self.num_released = 0

    async def share(self, ingress_id: str, totals: Totals) -> Totals:
        return self.ledger.share(ingress_id, totals)

    async def admit(self, key: str, request_id: str, **limits: Any) -> tuple[str, float]:
        if not self.is_up:
            raise ConnectionError("gone")
        return self.ledger.admit(key, request_id, **limits)

    async def release(self, key: str, request_id: str) -> None:
        self.ledger.release(key, request_id)
        self.num_released += 1


def test_a_client_that_leaves_while_it_is_let_in_leaves_nothing_behind() -> None:
    class Slow(Shared):
        async def admit(self, key: str, request_id: str, **limits: Any) -> tuple[str, float]:
            answer = await super().admit(key, request_id, **limits)
            counted.set()
            await may_answer.wait()
            return answer

    async def enter(limits: KeyLimits) -> None:
        async with limits.admitted("k"):
            pass

    async def scenario() -> None:
        shared = Slow()
        limits = KeyLimits(LimitSettings(max_requests_per_key=1), shared)
        leaving = asyncio.create_task(enter(limits))
        await counted.wait()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await until(lambda: shared.num_released == 1)
        may_answer.set()
        await enter(limits)

    counted, may_answer = asyncio.Event(), asyncio.Event()
    asyncio.run(scenario())


def test_limits_hold_across_ingresses_and_fall_back_to_each_alone() -> None:
    async def scenario() -> None:
        shared = Shared()
        limits = LimitSettings(max_requests_per_key=1)
        one, two = KeyLimits(limits, shared), KeyLimits(limits, shared)
        async with one.admitted("k"):
            with pytest.raises(TooManyRequests, match="1 requests in flight"):
                async with two.admitted("k"):
                    pass
        await until(lambda: shared.num_released == 1)
        async with two.admitted("k"):
            pass
        shared.is_up = False
        async with one.admitted("k"), two.admitted("k"):
            with pytest.raises(TooManyRequests):
                async with one.admitted("k"):
                    pass

    asyncio.run(scenario())


def test_a_request_that_the_ledger_counted_too_late_does_not_stay_counted() -> None:
    class Late(Shared):
        async def admit(self, key: str, request_id: str, **limits: Any) -> tuple[str, float]:
            await super().admit(key, request_id, **limits)
            raise TimeoutError

    async def scenario() -> None:
        shared = Late()
        async with KeyLimits(LimitSettings(max_requests_per_key=1), shared).admitted("k"):
            await until(lambda: shared.num_released == 1)
            assert shared.ledger.admit("k", "next", per_minute=None, at_once=1, lease_s=1.0) == ("", 0.0)

    asyncio.run(scenario())
