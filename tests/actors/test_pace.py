"""How long the chunk of a prompt becomes beside decodes, on machines of known speed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from actors.pace import Pace


def steps(
    pace: Pace, count: int, num_decodes: int, *, prefill: bool, base_s: float, token_s: float, num_waiting: int = 1
) -> list[float]:
    """Durations of steps whose prompt chunk is as long as the pace allows."""
    durations = []
    for _ in range(count):
        work: list[Any] = [SimpleNamespace(begin=7, end=8) for _ in range(num_decodes)]
        chunk = pace.prefill_budget(num_decodes, num_waiting) if prefill else 0
        if chunk:
            work.append(SimpleNamespace(begin=0, end=chunk))
        durations.append(base_s + token_s * chunk)
        pace.observe(work, durations[-1])
    return durations


def test_a_step_beside_a_prefill_comes_to_take_about_twice_a_step_of_decodes():
    for token_s in (0.0001, 0.0005):
        pace = Pace()
        steps(pace, 20, 8, prefill=False, base_s=0.010, token_s=token_s)
        durations = steps(pace, 50, 8, prefill=True, base_s=0.010, token_s=token_s)
        assert max(durations[2:]) < 2.4 * 0.010, "never much longer after the first steps"
        assert 0.020 < durations[-1] < 0.023


def test_a_slower_machine_shortens_the_chunk_at_once_and_a_quiet_one_lengthens_it_again():
    pace = Pace()
    steps(pace, 20, 8, prefill=False, base_s=0.010, token_s=0.0001)
    steps(pace, 50, 8, prefill=True, base_s=0.010, token_s=0.0001)
    before = pace.prefill_budget(8, 1)
    steps(pace, 3, 8, prefill=True, base_s=0.100, token_s=0.0001)
    assert pace.prefill_budget(8, 1) == pace.smallest_chunk
    steps(pace, 40, 8, prefill=True, base_s=0.010, token_s=0.0001)
    assert pace.prefill_budget(8, 1) > 0.9 * before


def test_few_decodes_and_many_have_their_own_usual_duration():
    pace = Pace()
    steps(pace, 20, 1, prefill=False, base_s=0.004, token_s=0.0)
    steps(pace, 20, 32, prefill=False, base_s=0.020, token_s=0.0)
    assert 0.040 < steps(pace, 60, 32, prefill=True, base_s=0.020, token_s=0.0001)[-1] < 0.046
    assert 0.008 < steps(pace, 60, 1, prefill=True, base_s=0.004, token_s=0.0001)[-1] < 0.010


@pytest.mark.parametrize(("num_waiting", "stretch"), [(8, 2.2), (16, 4.4), (400, 8.8)])
def test_the_more_wait_for_their_first_token_the_longer_a_step_may_take(num_waiting: int, stretch: float):
    pace = Pace()
    steps(pace, 20, 8, prefill=False, base_s=0.010, token_s=0.0001)
    durations = steps(pace, 60, 8, prefill=True, base_s=0.010, token_s=0.0001, num_waiting=num_waiting)
    assert 0.9 * stretch < durations[-1] / 0.010 < 1.05 * stretch


def test_a_burst_does_not_change_what_one_prompt_gets_after_it():
    pace = Pace()
    steps(pace, 20, 8, prefill=False, base_s=0.010, token_s=0.0001)
    before = steps(pace, 60, 8, prefill=True, base_s=0.010, token_s=0.0001)[-1]
    steps(pace, 20, 8, prefill=True, base_s=0.010, token_s=0.0001, num_waiting=100)
    after = steps(pace, 1, 8, prefill=True, base_s=0.010, token_s=0.0001)[-1]
    assert abs(after / before - 1.0) < 0.1
