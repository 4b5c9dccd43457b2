"""Labels of tokens to entities, as transformers' TokenClassificationPipeline does it.

none     each token with its best label
simple   neighbours with the same label become one entity; "B-" always begins a new one
first    as simple, but a word has one label: its first token's
max      ... that of the token with the highest score
average  ... the best of the tokens' mean scores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.request import Rows
from deploy.placed_tokens import PlacedToken, trim

T = TypeVar("T")
Scores = NDArray[np.float64]
Strategy = Literal["none", "simple", "first", "average", "max"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, a character of several tokens, or a word, with the scores of all labels."""

    start: int
    end: int
    scores_L: Scores


def entities(
    text: str,
    tokens: Sequence[PlacedToken],
    outputs_TL: Rows,
    id2label: Mapping[int, str],
    strategy: Strategy,
    ignore_labels: Sequence[str],
) -> list[dict[str, Any]]:
    """The pipeline's answer for one window of the text; `outputs_TL` are the head's raw outputs, T tokens x L labels.

    Entities of several tokens still begin with the space before a word; see `trimmed`."""
    scores_TL = softmax(np.asarray(outputs_TL, dtype=np.float64), axis=-1)
    mine = [(i, token) for i, token in enumerate(tokens) if token.text_idx is not None]

    def best(scores_L: Scores) -> tuple[str, float]:
        return id2label[int(scores_L.argmax())], float(scores_L.max())

    if strategy == "none":
        found = []
        for i, token in mine:
            label, score = best(scores_TL[i])
            place = {"word": token.piece, "start": token.start, "end": token.end}
            found.append({"entity": label, "score": score, "index": i, **place})
        return [entity for entity in found if entity["entity"] not in ignore_labels]

    # Tokens that share a character, as the bytes of an emoji do, count as one with their mean scores: the pipeline lets
    # entities begin and end in the middle of a character; then two of them claim it.
    pieces = [Piece(token.start, token.end, scores_TL[i]) for i, token in mine]
    pieces = [_merged(group, "average") for group in _runs(pieces, lambda one, next_: next_.start < one.end)]
    if strategy != "simple":
        # A piece goes on with a word unless a space stands before it or it begins with one.
        words = _runs(pieces, lambda _, next_: " " not in text[next_.start - 1 : next_.start + 1])
        pieces = [_merged(word, strategy) for word in words]

    labels = [(piece, *best(piece.scores_L)) for piece in pieces]
    found = []
    for group in _runs(labels, lambda one, next_: not next_[1].startswith("B-") and _kind(next_[1]) == _kind(one[1])):
        start, end = group[0][0].start, group[-1][0].end
        score = float(np.mean([score for _, _, score in group]))
        name = group[0][1].split("-", 1)[-1]
        found.append({"entity_group": name, "score": score, "word": text[start:end], "start": start, "end": end})
    return [entity for entity in found if entity["entity_group"] not in ignore_labels]


def softmax(outputs: Scores, axis: int) -> Scores:
    powers = np.exp(outputs - outputs.max(axis=axis, keepdims=True))
    scores: Scores = powers / powers.sum(axis=axis, keepdims=True)
    return scores


def longest_of_overlapping(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entities of several windows: of those that overlap the longest stays, and the likelier of equally long ones."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(found, key=lambda one: int(one["start"])):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
        else:
            kept[-1] = max(kept[-1], entity, key=lambda one: (one["end"] - one["start"], one["score"]))
    return kept


def trimmed(text: str, entity: Mapping[str, Any]) -> dict[str, Any]:
    """The entity without white space at its ends; its word is what stands there in the text."""
    start, end = trim(text, entity["start"], entity["end"])
    return {**entity, "word": text[start:end], "start": start, "end": end}


def _runs(items: Sequence[T], goes_on: Callable[[T, T], bool]) -> list[list[T]]:
    """The items in runs: one goes on with the run of the item before it, or begins another."""
    runs: list[list[T]] = []
    for item in items:
        if runs and goes_on(runs[-1][-1], item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _merged(pieces: Sequence[Piece], strategy: Strategy) -> Piece:
    scores_PL = np.array([piece.scores_L for piece in pieces])
    if strategy == "first":
        scores_L = scores_PL[0]
    elif strategy == "max":
        scores_L = scores_PL[int(scores_PL.max(axis=1).argmax())]
    else:
        scores_L = scores_PL.mean(axis=0)
    return Piece(pieces[0].start, pieces[-1].end, scores_L)


def _kind(label: str) -> str:
    """A label without "B-" or "I-" is its own."""
    return label[2:] if label.startswith(("B-", "I-")) else label
