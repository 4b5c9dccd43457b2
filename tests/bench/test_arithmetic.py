"""What the benchmarks compute from their measurements, on numbers that can be checked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cluster.planner import Layout, Targets, step_times
from deploy.bench import Outcome
from tests.bench import calibration, report
from tests.bench.growth import slope
from tests.bench.limits import decode_limit, prefill_limit
from tests.bench.run import RESULTS
from tests.bench.service import decode_rate

SIZE = calibration.NUM_OUTPUTS * calibration.NUM_INPUTS


def test_a_slope_is_the_exponent() -> None:
    assert slope([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_the_decode_rate_counts_only_while_all_streams_decode() -> None:
    early = Outcome(1, 0.0, [0.0, 1.0, 2.0, 3.0], 4)
    late = Outcome(1, 0.0, [1.0, 2.0, 3.0, 4.0, 5.0], 5)
    assert decode_rate([early, late]) == pytest.approx(4 / 2)  # tokens at 2 and 3 of both, between 1 and 3


def test_limits_of_mid_are_those_computed_by_hand() -> None:
    mid = calibration.shape_of("mid", "bf16")
    layer = 4 * 2048 * 2048 + 60 * 2048 + 3 * 2048 * 5632
    numbers = 4 * (layer + 4 * 3 * 2048 * 1408) + 32000 * 2048
    assert decode_limit(mid, 1, 28e9) == pytest.approx(28e9 / (2 * numbers))
    assert prefill_limit(mid, 276e9) == pytest.approx(276e9 / (2 * (numbers - 32000 * 2048)))


def test_report_and_readme_say_what_was_measured() -> None:
    results = json.loads((RESULTS / "bench.json").read_text())
    assert (RESULTS / "report.md").read_text() == report.render(results)
    assert "\n".join(report.short(results)) in report.README.read_text()


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_a_device_is_recovered_from_the_times_that_it_would_take(overlap: float) -> None:
    device = calibration.Device(
        name="d", memory_bytes=1, bandwidth=2e10, flops=1e11, network=1, overlap=overlap, efficiency=1.0
    )
    times = {
        "rows": {rows: device.work_s(2 * SIZE, 2 * SIZE * rows) for rows in calibration.ROWS},
        "together": device.work_s(2 * SIZE, 2 * SIZE),
        "kv_bandwidth": 1e10,
    }
    found = calibration.kernel_device(times, 2.0)
    assert found.bandwidth == pytest.approx(2e10, rel=0.01) and found.flops == pytest.approx(1e11, rel=0.01)
    assert found.overlap == pytest.approx(overlap, abs=0.02)


def test_overheads_and_the_exchange_are_recovered_from_the_steps_that_they_would_make() -> None:
    kernels = calibration.Device(
        name="d", memory_bytes=1, bandwidth=2e10, flops=1e11, network=1e12, efficiency=1.0, latency_s=0, overhead_s=0
    )
    true = replace(
        kernels,
        latency_s=1e-4, overhead_s=2e-4, row_s=1e-5, message_s=5e-5, step_s=3e-4, sequence_s=1e-5, network=2e9,
    )  # fmt: skip
    steps = {
        f"{layers}/{shards}": {
            str(batch): step_times(
                calibration.shape_of("thin-8", "bf16", layers),
                true,
                Layout(routers=1, shards=shards),
                Targets(users=batch, context=calibration.CONTEXT, tpot_s=1.0),
            ).step_s
            for batch in (1, 32)
        }
        for layers, shards in ((2, 0), (8, 0), (8, 1), (8, 3))
    }
    found = calibration.with_overheads(kernels, steps)
    for name in ("latency_s", "overhead_s", "row_s", "message_s", "step_s", "sequence_s", "network"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.1), name
