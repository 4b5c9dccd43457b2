"""Labels of tokens to entities, as transformers' TokenClassificationPipeline does it.

none     each token with its best label
simple   neighbours with the same label become one entity; "B-" always begins a new one
first    as simple, but a word has one label: its first token's
max      ... that of the token with the highest score
average  ... the best of the tokens' mean scores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploy.placed_tokens import PlacedToken, trim

Scores = NDArray[np.float64]
Strategy = Literal["none", "simple", "first", "average", "max"]


@dataclass(frozen=True, slots=True)
class Tagged:
    """A token, or a whole word, with the scores of all labels; `score` and `label` are those of the best."""

    start: int
    end: int
    label: str
    score: float


def entities(
    text: str,
    tokens: Sequence[PlacedToken],
    outputs_TL: Sequence[Sequence[float]],
    id2label: Mapping[int, str],
    strategy: Strategy,
    ignore_labels: Sequence[str],
) -> list[dict[str, Any]]:
    """The pipeline's answer for one window of the text; `outputs_TL` are the head's raw outputs, T tokens x L labels.

    Entities of several tokens still begin with the space before a word; see `trimmed`."""
    scores_TL = _softmax(np.asarray(outputs_TL, dtype=np.float64))
    mine = [(i, token) for i, token in enumerate(tokens) if token.text_idx is not None]
    found: list[dict[str, Any]]
    if strategy == "none":
        found = []
        for i, token in mine:
            best = int(scores_TL[i].argmax())
            found.append(
                {
                    "entity": id2label[best],
                    "score": float(scores_TL[i, best]),
                    "index": i,
                    "word": token.piece,
                    "start": token.start,
                    "end": token.end,
                }
            )
        return [entity for entity in found if entity["entity"] not in ignore_labels]
    mine, scores_TL = _whole_characters(mine, scores_TL)
    if strategy == "simple":
        tagged = [_tagged([token], scores_TL[i], id2label) for i, token in mine]
    else:
        tagged = [
            _tagged([token for _, token in word], _word_scores(scores_TL[[i for i, _ in word]], strategy), id2label)
            for word in _words(text, mine)
        ]
    found = [_entity(text, group) for group in _groups(tagged)]
    return [entity for entity in found if entity["entity_group"] not in ignore_labels]


def longest_of_overlapping(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entities of several windows: of those that overlap the longest stays, and the likelier of equally long ones."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(found, key=lambda one: int(one["start"])):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
        elif _rank(entity) > _rank(kept[-1]):
            kept[-1] = entity
    return kept


def trimmed(text: str, entity: Mapping[str, Any]) -> dict[str, Any]:
    """The entity without white space at its ends; its word is what stands there in the text."""
    start, end = trim(text, entity["start"], entity["end"])
    return {**entity, "word": text[start:end], "start": start, "end": end}


def _rank(entity: Mapping[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]


def _whole_characters(
    tokens: Sequence[tuple[int, PlacedToken]], scores_TL: Scores
) -> tuple[list[tuple[int, PlacedToken]], Scores]:
    """Tokens that share a character, as the bytes of an emoji do, as one with their mean scores.

    The pipeline lets entities begin and end in the middle of a character; then two of them claim it."""
    groups: list[list[tuple[int, PlacedToken]]] = []
    for i, token in tokens:
        if groups and token.start < groups[-1][-1][1].end:
            groups[-1].append((i, token))
        else:
            groups.append([(i, token)])
    whole = [(i, replace(group[0][1], end=group[-1][1].end)) for i, group in enumerate(groups)]
    return whole, np.array([scores_TL[[i for i, _ in group]].mean(axis=0) for group in groups])


def _words(text: str, tokens: Sequence[tuple[int, PlacedToken]]) -> list[list[tuple[int, PlacedToken]]]:
    """Tokens in words: a token goes on with a word unless a space stands before it or it begins with one."""
    words: list[list[tuple[int, PlacedToken]]] = []
    for i, token in tokens:
        goes_on = token.start > 0 and " " not in text[token.start - 1 : token.start + 1]
        if words and goes_on:
            words[-1].append((i, token))
        else:
            words.append([(i, token)])
    return words


def _word_scores(scores_TL: Scores, strategy: Strategy) -> Scores:
    """One row of scores for a word."""
    if strategy == "first":
        first: Scores = scores_TL[0]
        return first
    if strategy == "max":
        surest: Scores = scores_TL[int(scores_TL.max(axis=1).argmax())]
        return surest
    mean: Scores = scores_TL.mean(axis=0)
    return mean


def _tagged(tokens: Sequence[PlacedToken], scores_L: Scores, id2label: Mapping[int, str]) -> Tagged:
    best = int(scores_L.argmax())
    return Tagged(tokens[0].start, tokens[-1].end, id2label[best], float(scores_L[best]))


def _groups(tagged: Sequence[Tagged]) -> list[list[Tagged]]:
    groups: list[list[Tagged]] = []
    for one in tagged:
        begins, kind = _read_label(one.label)
        if groups and not begins and kind == _read_label(groups[-1][-1].label)[1]:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _read_label(label: str) -> tuple[bool, str]:
    """(begins an entity, its kind). A label without "B-" or "I-" goes on."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _entity(text: str, group: Sequence[Tagged]) -> dict[str, Any]:
    start, end = group[0].start, group[-1].end
    return {
        "entity_group": group[0].label.split("-", 1)[-1],
        "score": float(np.mean([one.score for one in group])),
        "word": text[start:end],
        "start": start,
        "end": end,
    }


def _softmax(outputs_TL: Scores) -> Scores:
    powers = np.exp(outputs_TL - outputs_TL.max(axis=-1, keepdims=True))
    scores: Scores = powers / powers.sum(axis=-1, keepdims=True)
    return scores
