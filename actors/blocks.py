"""KV blocks: a fixed pool per KV group, reference counts, and a prefix cache of full blocks.

A block holds `block_size` consecutive positions of one sequence, in all layers of its group. Full blocks are named
by a hash chained over everything before them, so an equal prefix finds equal blocks; a released block keeps its
name until it is needed again (least recently used first).

    tokens   [0 ........ 15][16 ....... 31][32 .. 40]        block_size 16
    names     h0 = H(scope, t0..15) h1 = H(h0, t16..31)      the last block is not full: it has no name

Block 0 of every pool is never handed out: tables use it where a sliding-window layer has given a block back.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NULL_BLOCK = 0


class BlockPool:
    """The blocks of one KV group, two at the least. Never grows."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_users = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(1, num_blocks))
        self._name_of: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def take(self) -> int:
        """A block for new content; the caller must have checked num_free."""
        block, _ = self._free.popitem(last=False)
        name = self._name_of.pop(block, None)
        if name is not None:
            del self._named[name]
        self._num_users[block] = 1
        return block

    def find(self, name: bytes) -> int | None:
        return self._named.get(name)

    def share(self, block: int) -> None:
        """One more user of a block that find() returned."""
        if self._num_users[block] == 0:
            del self._free[block]
        self._num_users[block] += 1

    def give_back(self, block: int) -> None:
        self._num_users[block] -= 1
        if self._num_users[block] == 0:
            self._free[block] = None
            if block not in self._name_of:
                self._free.move_to_end(block, last=False)  # nothing to reuse: the first to go

    def name(self, block: int, name: bytes) -> None:
        """Make a full block findable. If an equal block is known already, this one stays nameless."""
        if block not in self._name_of and name not in self._named:
            self._name_of[block] = name
            self._named[name] = block

    def forget_names(self) -> None:
        """Empty the prefix cache; users keep their blocks."""
        self._name_of.clear()
        self._named.clear()

    def check_integrity(self, users: Sequence[int]) -> None:
        """users: every block of every live table, with repeats. AssertionError where the books don't balance."""
        counts = [0] * self.num_blocks
        for block in users:
            counts[block] += 1
        counts[NULL_BLOCK] = 0
        assert counts == self._num_users, "a block's user count differs from the tables that hold it"
        unused = {b for b in range(1, self.num_blocks) if counts[b] == 0}
        assert unused == set(self._free), "the free list differs from the blocks nobody uses"
        assert {n: b for b, n in self._name_of.items()} == self._named, "names and blocks don't match"


@dataclass(slots=True)
class BlockTable:
    """One sequence's blocks: tables[group][i] holds positions [i * block_size, (i + 1) * block_size)."""

    tables: list[list[int]]
    names: list[bytes] = field(default_factory=list)
    num_named: int = 0
    num_freed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_freed = [0] * len(self.tables)


class BlockManager:
    """All KV groups together.

    windows[g]: None where group g attends to everything, else its sliding window in tokens. prefix_caching: requests
    share blocks; without it only the sequences of one request do, which the caller's choice of scope sees to.
    """

    def __init__(
        self, pools: Sequence[BlockPool], windows: Sequence[int | None], block_size: int, prefix_caching: bool
    ) -> None:
        self.pools = list(pools)
        self.windows = list(windows)
        self.block_size = block_size
        self.prefix_caching = prefix_caching

    def new_table(self) -> BlockTable:
        return BlockTable([[] for _ in self.pools])

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def usage(self) -> float:
        """Share of the fullest pool that is in use, 0 to 1."""
        return max(pool.num_used / (pool.num_blocks - 1) for pool in self.pools)

    def prefix_names(self, table: BlockTable, token_ids: Sequence[int], scope: str | None) -> list[bytes]:
        """Names of the blocks that may come from others: all full ones, but one token is left to compute."""
        count = (len(token_ids) - 1) // self.block_size
        return self._names(table, token_ids, count, scope)[:count]

    def match_prefix(self, table: BlockTable, token_ids: Sequence[int], scope: str | None) -> int:
        """Fill an empty table with cached blocks of the longest known prefix; returns its length in tokens.

        A group with a window only needs the blocks that later positions still look at.
        """
        names = self.prefix_names(table, token_ids, scope)
        num_hits = 0
        for name in names:
            if any(p.find(name) is None for p, w in zip(self.pools, self.windows, strict=True) if w is None):
                break
            num_hits += 1
        while num_hits and not all(
            pool.find(names[i]) is not None
            for pool, window in zip(self.pools, self.windows, strict=True)
            for i in range(self._first_needed(window, num_hits * self.block_size), num_hits)
        ):
            num_hits -= 1
        for group, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            first = self._first_needed(window, num_hits * self.block_size)
            found = [pool.find(name) for name in names[first:num_hits]]
            blocks = [b for b in found if b is not None]
            for block in blocks:
                pool.share(block)
            table.tables[group] = [NULL_BLOCK] * first + blocks
            table.num_freed[group] = first
        table.num_named = num_hits
        return num_hits * self.block_size

    def fits(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether positions [0, num_tokens) would fit in the free blocks; windows make this an upper estimate."""
        needed = self.blocks_for(num_tokens)
        return all(
            min(needed - len(blocks), self._most_held(window)) <= pool.num_free
            for blocks, pool, window in zip(table.tables, self.pools, self.windows, strict=True)
        )

    def reserve(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for positions [0, num_tokens). All groups or none; False when a pool is too empty."""
        needed = self.blocks_for(num_tokens)
        if any(needed - len(t) > p.num_free for t, p in zip(table.tables, self.pools, strict=True)):
            return False
        for blocks, pool in zip(table.tables, self.pools, strict=True):
            while len(blocks) < needed:
                blocks.append(pool.take())
        return True

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int, scope: str | None) -> None:
        """After positions [0, num_computed) are written: name full blocks, give back what no window reaches."""
        num_full = num_computed // self.block_size
        names = self._names(table, token_ids, num_full, scope)
        for i in range(table.num_named, num_full):
            self._name_block(table, i, names[i])
        table.num_named = max(num_full, table.num_named)
        for group, (pool, window) in enumerate(zip(self.pools, self.windows, strict=True)):
            first = self._first_needed(window, num_computed)
            blocks = table.tables[group]
            for i in range(table.num_freed[group], first):
                pool.give_back(blocks[i])
                blocks[i] = NULL_BLOCK
            table.num_freed[group] = max(first, table.num_freed[group])

    def release(self, table: BlockTable) -> None:
        """Give every block back. Late blocks first, so that a shared prefix is the last to be overwritten."""
        for group, pool in enumerate(self.pools):
            for block in reversed(table.tables[group]):
                if block != NULL_BLOCK:
                    pool.give_back(block)
            table.tables[group] = []
            table.num_freed[group] = 0
        table.num_named = 0

    def check_integrity(self, tables: Sequence[BlockTable]) -> None:
        for group, pool in enumerate(self.pools):
            pool.check_integrity([b for table in tables for b in table.tables[group]])

    def _name_block(self, table: BlockTable, index: int, name: bytes) -> None:
        for blocks, pool in zip(table.tables, self.pools, strict=True):
            if blocks[index] != NULL_BLOCK:
                pool.name(blocks[index], name)

    def _names(self, table: BlockTable, token_ids: Sequence[int], count: int, scope: str | None) -> list[bytes]:
        """Names of at least the first `count` full blocks, kept in the table and only extended."""
        names = table.names
        size = self.block_size
        while len(names) < count:
            before = names[-1] if names else hashlib.blake2b(repr(scope).encode(), digest_size=16).digest()
            i = len(names)
            content = array("q", token_ids[i * size : (i + 1) * size]).tobytes()
            names.append(hashlib.blake2b(content, digest_size=16, key=before).digest())
        return names

    def _most_held(self, window: int | None) -> int:
        """Blocks a decoding sequence holds at the most in a group."""
        return self.blocks_for(window) + 1 if window is not None else 1 << 60

    def _first_needed(self, window: int | None, num_computed: int) -> int:
        """First block that a query at position num_computed, or later, can still see."""
        if window is None:
            return 0
        return max(0, num_computed - window + 1) // self.block_size
