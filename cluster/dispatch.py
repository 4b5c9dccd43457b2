"""Which token goes to which shard: the plan of one exchange, as pure functions over small numpy arrays.

Worked example: 3 tokens, top-2, experts 0-1 on shard 0 and 2-3 on shard 1.

    topk_ids  [[0, 2],     shard 0: rows of tokens 0, 1, pairs (row 0, expert 0) (row 1, expert 1) (row 1, expert 0)
               [1, 0],     shard 1: rows of tokens 0, 2, pairs (row 0, expert 2) (row 1, expert 3) (row 1, expert 2)
               [3, 2]]

A token goes to a shard once, however many of its experts are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.placement import Placement

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """holders_ER[e, r]: index of the shard that holds copy r of expert e; num_holders_E[e]: how many copies.

    Columns beyond an expert's copies repeat its first one.
    """

    holders_ER: IntArray
    num_holders_E: IntArray
    replicated: bool


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard's part: token of each row [N]; row, expert and flat (token * K + k) index of each pair [P]."""

    token_of_row_N: IntArray
    pair_rows_P: IntArray
    pair_experts_P: IntArray
    pair_index_P: IntArray


def routing_tables(placement: Placement, shard_ids: Sequence[str]) -> dict[int, RoutingTable]:
    """The placement in terms of ranks, one table per MoE layer. Holders that are no members are left out.

    Raises ValueError naming the first expert that no member holds.
    """
    index = {shard_id: i for i, shard_id in enumerate(shard_ids)}
    tables = {}
    for layer_idx, experts in placement.holders.items():
        copies = [[index[s] for s in shards if s in index] for shards in experts]
        for expert_id, held in enumerate(copies):
            if not held:
                raise ValueError(
                    f"expert {expert_id} of layer {layer_idx} is on none of the shards {list(shard_ids)}; "
                    "load it somewhere before it is placed"
                )
        width = max(map(len, copies))
        holders = np.array([held + held[:1] * (width - len(held)) for held in copies], dtype=np.int64)
        counts = np.array([len(held) for held in copies], dtype=np.int64)
        tables[layer_idx] = RoutingTable(holders, counts, bool(width > 1))
    return tables


def plan_dispatch(topk_ids_TK: IntArray, table: RoutingTable, num_shards: int, turn: int = 0) -> list[ShardPlan | None]:
    """Split the pairs of one layer over the shards; None for a shard that gets nothing.

    Replicas share an expert's tokens in turn: token t takes copy (t + turn) mod copies.
    """
    num_tokens, top_k = topk_ids_TK.shape
    experts_P = topk_ids_TK.reshape(-1)
    tokens_P = np.repeat(np.arange(num_tokens, dtype=np.int64), top_k)
    if table.replicated:
        shards_P = table.holders_ER[experts_P, (tokens_P + turn) % table.num_holders_E[experts_P]]
    else:
        shards_P = table.holders_ER[experts_P, 0]
    order = np.argsort(shards_P, kind="stable")
    ends = np.cumsum(np.bincount(shards_P, minlength=num_shards))
    plans: list[ShardPlan | None] = []
    begin = 0
    for end in ends.tolist():
        plans.append(_shard_plan(order[begin:end], tokens_P, experts_P) if end > begin else None)
        begin = end
    return plans


def _shard_plan(pair_index_P: IntArray, tokens_P: IntArray, experts_P: IntArray) -> ShardPlan:
    tokens = tokens_P[pair_index_P]  # ascending, since the sort was stable
    is_new_row = np.empty(len(tokens), dtype=bool)
    is_new_row[0] = True
    np.not_equal(tokens[1:], tokens[:-1], out=is_new_row[1:])
    return ShardPlan(
        token_of_row_N=tokens[is_new_row],
        pair_rows_P=np.cumsum(is_new_row) - 1,
        pair_experts_P=experts_P[pair_index_P],
        pair_index_P=pair_index_P,
    )


def plan_dispatch_reference(topk_ids: Sequence[Sequence[int]], holders: Any, num_shards: int) -> list[dict[str, Any]]:
    """The same plan, one pair at a time: slow, plain, for tests. holders[expert] = shard index."""
    plans: list[dict[str, Any]] = [{"tokens": [], "pairs": []} for _ in range(num_shards)]
    for token, experts in enumerate(topk_ids):
        for expert in experts:
            plan = plans[holders[expert]]
            if token not in plan["tokens"]:
                plan["tokens"].append(token)
            plan["pairs"].append((plan["tokens"].index(token), expert))
    return plans
