"""Question answering: the likeliest spans of a context, found as transformers' pipeline did it (until v4).

For each window of the context the start and the end outputs get a softmax over the window's context tokens alone; a
span's score is P(start) * P(end), for end >= start and no more than `max_answer_len` tokens. Spans with the same text
in one window are one answer, with their scores added; of an answer found in several windows the best score stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from actors.request import Rows
from deploy.aggregation import softmax
from deploy.openai_requests import RequestBody
from deploy.placed_tokens import PlacedToken, split, trim

Vector = NDArray[np.float64]


class SpanOptions(RequestBody):
    """The defaults of transformers' pipeline."""

    top_k: int = Field(default=1, ge=1, le=1000)
    max_answer_len: int = Field(default=15, ge=1)
    align_to_words: bool = True
    handle_impossible_answer: bool = False


def answers(
    context: str,
    windows: Sequence[tuple[Sequence[PlacedToken], Rows]],
    options: SpanOptions,
) -> list[dict[str, Any]]:
    """At most `top_k` answers, the best first. Each window is its tokens and the head's outputs for them, T x 2."""
    found: dict[str, dict[str, Any]] = {}
    null_score = 1.0
    for tokens, outputs_T2 in windows:
        of_window, window_null = _window_answers(context, tokens, np.asarray(outputs_T2, dtype=np.float64), options)
        null_score = min(null_score, window_null)
        for text, answer in of_window.items():
            if text not in found or answer["score"] > found[text]["score"]:
                found[text] = answer
    ranked = [answer for answer in found.values() if not answer["answer"].isspace()] or list(found.values())
    if options.handle_impossible_answer:
        ranked.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
    return sorted(ranked, key=lambda answer: -float(answer["score"]))[: options.top_k]


def _window_answers(
    context: str, tokens: Sequence[PlacedToken], outputs_T2: Vector, options: SpanOptions
) -> tuple[dict[str, dict[str, Any]], float]:
    """Answers by lower-case text, and the score of there being none.

    "No answer" is a span at the window's first token, which is where training puts it for tokenizers without a CLS
    token (transformers' run_qa.py). It takes part in the softmax only when it is asked for."""
    first, last = split(tokens, 1)
    null_row = outputs_T2[:1] if options.handle_impossible_answer else outputs_T2[:0]
    starts, ends = softmax(np.concatenate([null_row, outputs_T2[first:last]]), axis=0).T
    null_score = float(starts[0] * ends[0]) if len(null_row) else 0.0
    starts, ends = starts[len(null_row) :], ends[len(null_row) :]
    num_spans = 2 * options.top_k + 10 if options.align_to_words else options.top_k
    found: dict[str, dict[str, Any]] = {}
    for begin, end, score in top_spans(starts, ends, num_spans, options.max_answer_len):
        from_idx, to_idx = first + begin, first + end
        if options.align_to_words:
            from_idx, to_idx = _word_edge(tokens, from_idx, -1), _word_edge(tokens, to_idx, 1)
        start_char, end_char = trim(context, tokens[from_idx].start, tokens[to_idx].end)
        answer = context[start_char:end_char]
        if (known := found.get(answer.lower())) is not None:
            known["score"] += score
        else:
            found[answer.lower()] = {"score": score, "start": start_char, "end": end_char, "answer": answer}
    return found, null_score


def top_spans(starts: Vector, ends: Vector, num_spans: int, max_len: int) -> list[tuple[int, int, float]]:
    """(begin, end, starts[begin] * ends[end]) of the best spans with begin <= end < begin + max_len, best first.

    O(tokens x max_len) time, O(tokens + num_spans) memory."""
    T = len(starts)
    best: list[tuple[int, int, float]] = []
    for length in range(min(max_len, T)):
        scores = starts[: T - length] * ends[length:]
        if len(best) >= num_spans:
            candidates = np.flatnonzero(scores > best[num_spans - 1][2])
        else:
            candidates = np.arange(len(scores))
        if len(candidates) > num_spans:
            candidates = candidates[np.argsort(-scores[candidates], kind="stable")[:num_spans]]
        if len(candidates):
            best += [(int(begin), int(begin) + length, float(scores[begin])) for begin in candidates]
            best = sorted(best, key=lambda span: (-span[2], span[0], span[1]))[:num_spans]
    return best


def _word_edge(tokens: Sequence[PlacedToken], idx: int, step: int) -> int:
    """The last token of the same word in one direction."""
    one = tokens[idx]
    while one.word_idx is not None and 0 <= idx + step < len(tokens):
        other = tokens[idx + step]
        if (one.text_idx, one.word_idx) != (other.text_idx, other.word_idx):
            break
        idx += step
    return idx
