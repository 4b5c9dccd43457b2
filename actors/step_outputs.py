"""What a step's hidden states become: drawn tokens, pooled rows, prompt log-probabilities, routed experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.request import Alternatives, GenerateRequest, PoolRequest, rows_to_wire
from actors.scheduler import Scheduled
from actors.sequence import Sequence as Running
from model.heads import Head
from model.logprobs import token_logprobs
from model.moe import Exchange, Receipt
from model.sampler_state import SamplingRow
from model.sampling import DrawTokens, sample

SCORED_AT_ONCE = 64  # prompt tokens; bounds the logits held for prompt_logprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """A token and its log-probabilities, or why none could be drawn."""

    token_id: int
    logprobs: Alternatives | None
    error: str | None


class ExpertRecorder:
    """An exchange that notes which experts each token of a step goes to, and passes everything on."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._topk_ids: dict[int, list[Tensor]] = {}  # of each micro-batch

    def dispatch(self, layer_idx: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Receipt:
        self._topk_ids.setdefault(layer_idx, []).append(topk_ids_TK)
        return self._exchange.dispatch(layer_idx, x_TH, topk_ids_TK, topk_weights_TK)

    def combine(self, receipt: Receipt) -> Tensor:
        return self._exchange.combine(receipt)

    def keep(self, work: Sequence[Scheduled]) -> None:
        """Append [MoE layer][k] expert ids for each token that a sequence has not been told of yet."""
        layers = [torch.cat(self._topk_ids[i]) for i in sorted(self._topk_ids)]
        if not layers:
            return
        ids_TLK = torch.stack(layers, dim=1)
        row = 0
        for item in work:
            sequence, count = item.sequence, item.end - item.begin
            if wants_experts(sequence):
                new = max(item.begin, sequence.num_routed)
                sequence.routed_experts += ids_TLK[row + new - item.begin : row + count].tolist()
                sequence.num_routed = max(item.end, sequence.num_routed)
            row += count


def wants_experts(sequence: Running) -> bool:
    return isinstance(sequence.request, GenerateRequest) and sequence.request.return_routed_experts


def draw_tokens(work: Sequence[Scheduled], hidden_TH: Tensor, lm_head: Head, draw: DrawTokens) -> dict[int, Draw]:
    """Draw for every sequence whose last known token went through; by index into work."""
    rows: dict[int, int] = {}  # index into work -> row of hidden
    row = 0
    for idx, item in enumerate(work):
        row += item.end - item.begin
        if item.samples and item.sequence.sampler is not None:
            rows[idx] = row - 1
    if not rows:
        return {}
    wanted = torch.tensor(list(rows.values()), device=hidden_TH.device)
    logits_RV = lm_head.forward(hidden_TH.index_select(0, wanted))
    output = sample(logits_RV, [_sampling_row(work[idx].sequence) for idx in rows], draw)
    drawn = zip(rows, output.token_ids, output.logprobs, output.errors, strict=True)
    return {idx: Draw(token, logprobs, error) for idx, token, logprobs, error in drawn}


def gather_rows(work: Sequence[Scheduled], hidden_TH: Tensor, lm_head: Head | None, heads: Mapping[str, Head]) -> None:
    """Keep, in the sequences, what pool requests and prompt log-probabilities need of this step's rows."""
    row = 0
    for item in work:
        end_row = row + item.end - item.begin
        request = item.sequence.request
        if isinstance(request, PoolRequest):
            _pool(item, request, hidden_TH[row:end_row], heads)
        elif request.sampling.prompt_logprobs is not None and lm_head is not None:
            _score_prompt(item, request.sampling.prompt_logprobs, hidden_TH[row:end_row], lm_head)
        row = end_row


def _pool(item: Scheduled, request: PoolRequest, hidden_NH: Tensor, heads: Mapping[str, Head]) -> None:
    if request.tokens == "last":
        if not item.samples:
            return
        hidden_NH = hidden_NH[-1:]
    head = heads.get(request.head)
    values_NL = hidden_NH if head is None else head.forward(hidden_NH)
    item.sequence.pooled = rows_to_wire(values_NL.float().cpu().numpy())


def _score_prompt(item: Scheduled, num_top: int, hidden_NH: Tensor, lm_head: Head) -> None:
    """Log-probability of each next prompt token given the ones up to it; once, also after a preemption."""
    scores = item.sequence.prompt_logprobs
    end = min(item.end, item.sequence.prompt_len - 1)
    for start in range(len(scores) - 1, end, SCORED_AT_ONCE):
        stop = min(start + SCORED_AT_ONCE, end)
        logits = lm_head.forward(hidden_NH[start - item.begin : stop - item.begin])
        targets = item.sequence.token_ids[start + 1 : stop + 1]
        scores += token_logprobs(logits, targets, [num_top] * len(targets))


def _sampling_row(sequence: Running) -> SamplingRow:
    assert sequence.sampler is not None
    bitmask = sequence.matcher.bitmask() if sequence.matcher is not None else None
    return SamplingRow(state=sequence.sampler, bitmask=bitmask)
