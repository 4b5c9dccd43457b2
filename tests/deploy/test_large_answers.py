"""Large answers are rendered beside the event loop, which goes on with everybody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from actors.request import Rows
from deploy.openai_requests import parse
from deploy.pooling import PoolingRequest, pool
from deploy.router_pool import PoolRequest, RouterPool
from deploy.served_model import ModelList, ServedModel
from deploy.service import Service
from deploy.settings import Settings

ROW = np.random.default_rng(0).standard_normal(2048).astype(np.float32)


class NoRouter(RouterPool):
    """Answers by itself, at once."""

    def __init__(self) -> None:
        async def discover() -> list[dict[str, Any]]:
            return []

        super().__init__(discover, Settings())

    async def pool(self, request: PoolRequest) -> Rows:
        return [ROW] * 1000


def turns_of_the_loop(served: ServedModel, work: Callable[[Service], Coroutine[Any, Any, Any]]) -> tuple[int, Any]:
    """How often the event loop came round while the work was done, and its result."""

    async def run() -> tuple[int, Any]:
        service = Service(Settings(), ModelList([served]), NoRouter())
        task, turns = asyncio.ensure_future(work(service)), 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        service.close()
        return turns, task.result()

    return asyncio.run(run())


@pytest.mark.parametrize("is_raw", [True, False])
def test_rows_of_all_tokens(served: ServedModel, is_raw: bool) -> None:
    body = parse({"input": "x", "task": "token_embed", "use_activation": not is_raw}, PoolingRequest)
    turns, answer = turns_of_the_loop(served, lambda service: pool(service, body, "pool-1"))
    rows = json.loads(answer)["data"][0]["data"]
    assert len(rows) == 1000
    if is_raw:
        assert rows[7] == ROW.tolist(), "float32 as JSON writes them"
    assert turns > 5, "one that holds up the loop leaves it one or two turns"
