"""What the sampler remembers of one request, kept up to date token by token so that no step reads the history again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.sampling_params import SamplingParams


class SamplerState:
    """One request's parameters and history. The engine makes one per request and appends every committed token.

    A replayed request gives its old output as output_ids and goes on with the same random numbers. The parameters must
    have passed check_vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.prompt_ids = prompt_ids
        self.output_ids: list[int] = []
        self.bias_ids = np.array(list(params.logit_bias.keys()), dtype=np.int64)
        self.bias_values = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self._stop_ids = np.array(sorted(self.stop_token_ids.union(eos_token_ids)), dtype=np.int64)
        self._bad_tokens = tuple(word[0] for word in params.bad_words_ids if len(word) == 1)
        self._bad_words = _by_last_prefix_token(params.bad_words_ids)
        self._allowed_words: NDArray[np.int32] | None = None
        self._slots: dict[int, int] = {}  # token id -> where it stands in the two arrays
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)  # occurrences in the output
        if params.repetition_penalty != 1:
            for token in dict.fromkeys(prompt_ids):
                self._count(token, 0)
        for token in output_ids:
            self.append(token)

    @property
    def position(self) -> int:
        """Index of the token to be drawn next, in prompt + output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def edits_logits(self) -> bool:
        """Whether the next token's logits need anything done before the draw (apart from a grammar's bitmask)."""
        params = self.params
        return bool(
            params.has_penalties
            or params.logit_bias
            or params.bad_words_ids
            or params.allowed_token_ids is not None
            or len(self.output_ids) < params.min_tokens
        )

    def append(self, token: int) -> None:
        self.output_ids.append(token)
        if self.params.has_penalties:
            self._count(token, 1)

    def history(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct token ids that penalties touch, and how often each is in the output. Views, valid until append."""
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def bad_token_ids(self) -> list[int]:
        """Tokens that would be, or would complete, a bad word."""
        banned = list(self._bad_tokens)
        if self._bad_words and self.output_ids:
            for word in self._bad_words.get(self.output_ids[-1], ()):
                prefix = word[:-1]
                if tuple(self.output_ids[-len(prefix) :]) == prefix:
                    banned.append(word[-1])
        return banned

    def early_stop_ids(self) -> NDArray[np.int64]:
        """Tokens that min_tokens forbids for now, each once."""
        return self._stop_ids if len(self.output_ids) < self.params.min_tokens else self._stop_ids[:0]

    def allowed_words(self, num_words: int) -> NDArray[np.int32] | None:
        """allowed_token_ids as a packed bitmask [num_words], bit i of word w for token 32 * w + i."""
        if self.params.allowed_token_ids is None:
            return None
        if self._allowed_words is None:
            bits = np.zeros(num_words * 32, dtype=np.uint8)
            bits[list(self.params.allowed_token_ids)] = 1
            self._allowed_words = np.packbits(bits, bitorder="little").view(np.int32)
        return self._allowed_words

    def _count(self, token: int, times: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += times


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """One row of a step's logits: whose it is, and a grammar's bitmask if any (int32, [ceil(V / 32)], 1 = allowed)."""

    state: SamplerState
    bitmask: Tensor | None = None

    @property
    def edits_logits(self) -> bool:
        return self.bitmask is not None or self.state.edits_logits


def _by_last_prefix_token(words: Sequence[tuple[int, ...]]) -> dict[int, list[tuple[int, ...]]]:
    """Bad words of several tokens by the token before their last, so a step looks at few of them."""
    table: dict[int, list[tuple[int, ...]]] = {}
    for word in words:
        if len(word) > 1:
            table.setdefault(word[-2], []).append(word)
    return table
