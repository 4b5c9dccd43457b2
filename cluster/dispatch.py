"""Which token goes to which shard: the plan of one exchange, as pure functions over small numpy arrays.

Worked example: 3 tokens, top-2, experts 0-1 on shard 0 and 2-3 on shard 1.

    topk_ids  [[0, 2],     shard 0: rows of tokens 0, 1, pairs (row 0, expert 0) (row 1, expert 1) (row 1, expert 0)
               [1, 0],     shard 1: rows of tokens 0, 2, pairs (row 0, expert 2) (row 1, expert 3) (row 1, expert 2)
               [3, 2]]

    token_of_row_N  [0, 1, 0, 2]     row_starts   [0, 2, 4]
    pair_rows_P     [0, 1, 1, 0, 1, 1]   pair_starts  [0, 3, 6]

A token goes to a shard once, however many of its experts are there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

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
    first_holder_E: IntArray
    replicated: bool


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """All shards' parts, one after the other: rows [row_starts[i], row_starts[i + 1]) and pairs likewise are shard i's.

    token_of_row_N ascends within a shard. pair_rows_P counts from the shard's first row; pair_index_P is the pair's
    place in the flat topk_ids, token * K + k.
    """

    token_of_row_N: IntArray
    pair_rows_P: IntArray
    pair_experts_P: IntArray
    pair_index_P: IntArray
    row_starts: list[int]
    pair_starts: list[int]

    @property
    def is_on_one_shard(self) -> bool:
        num_pairs = self.pair_starts[-1]
        return all(start in (0, num_pairs) for start in self.pair_starts)


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
        tables[layer_idx] = RoutingTable(holders, counts, holders[:, 0].copy(), width > 1)
    return tables


def plan_dispatch(topk_ids_TK: IntArray, table: RoutingTable, num_shards: int, turn: int = 0) -> DispatchPlan:
    """Split the pairs of one layer over the shards; one that gets nothing has no rows.

    Replicas share an expert's tokens in turn: token t takes copy (t + turn) mod copies. Called for each layer of each
    step: every numpy call counts here (about a microsecond).
    """
    num_tokens, top_k = topk_ids_TK.shape
    experts_P = topk_ids_TK.reshape(-1)
    num_pairs = len(experts_P)
    index_P, tokens_P = _numbered(num_tokens, top_k)
    if num_shards == 1:
        tokens_T = index_P[:num_tokens]
        return DispatchPlan(tokens_T, tokens_P, experts_P, index_P, [0, num_tokens], [0, num_pairs])
    if table.replicated:
        shards_P = table.holders_ER[experts_P, (tokens_P + turn) % table.num_holders_E[experts_P]]
    else:
        shards_P = table.first_holder_E[experts_P]
    order_P = shards_P.argsort(kind="stable")
    pair_starts = [0, *np.bincount(shards_P, minlength=num_shards).cumsum().tolist()]
    tokens_P = tokens_P[order_P]  # ascending within a shard, since the sort was stable
    is_new_row = np.empty(num_pairs, dtype=bool)
    np.not_equal(tokens_P[1:], tokens_P[:-1], out=is_new_row[1:])
    for start in pair_starts[:-1]:
        if start < num_pairs:
            is_new_row[start] = True
    pair_rows_P = is_new_row.cumsum()
    row_starts = [0, *(int(pair_rows_P[end - 1]) if end else 0 for end in pair_starts[1:])]
    for shard_idx in range(num_shards):
        pair_rows_P[pair_starts[shard_idx] : pair_starts[shard_idx + 1]] -= row_starts[shard_idx] + 1
    return DispatchPlan(tokens_P[is_new_row], pair_rows_P, experts_P[order_P], order_P, row_starts, pair_starts)


@functools.lru_cache(maxsize=64)
def _numbered(num_tokens: int, top_k: int) -> tuple[IntArray, IntArray]:
    """The index and the token of each pair; not to be written to."""
    index_P = np.arange(num_tokens * top_k)
    return index_P, index_P // top_k
