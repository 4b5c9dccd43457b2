"""Tokens with their place in the caller's text, and windows over more tokens than a model reads at once.

Tokenizers normalize first (NFC, in Qwen's), and then say which characters of the original a token came from. Where
normalizing joined characters, they name only the first one; the place here covers all of them:

    caller's text   Z  o  e  U+0308       "Zoë" with a combining mark
    normalized      Z  o  ë
    offsets         (0, 2)  (2, 3)        what the tokenizers library says
    places          (0, 2)  (2, 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """`start` and `end` index the text that the token is from, in characters; `text_idx` says which of the two texts,
    None for a special token that the tokenizer added. `word_idx` is the pre-tokenizer's word, counted in its text."""

    token_id: int
    piece: str
    start: int
    end: int
    text_idx: int | None
    word_idx: int | None


def place_tokens(
    tokenizer: Tokenizer, text: str, pair: str | None = None, *, add_special_tokens: bool = True
) -> list[PlacedToken]:
    """Tokens of a text, or of a pair as the tokenizer's post-processor joins it."""
    given = text if pair is None else (text, pair)
    encoding = tokenizer.backend.encode_batch([given], add_special_tokens=add_special_tokens)[0]  # without the GIL
    texts = (text, pair or "")
    names = ("ids", "tokens", "offsets", "sequence_ids", "word_ids", "special_tokens_mask")
    rows = [*zip(*(getattr(encoding, name) for name in names), strict=True)]
    placed: list[PlacedToken] = []
    next_start = [len(one) for one in texts]  # where the token after this one begins, in each text
    last_end = [(0, 0), (0, 0)]  # (as the library says, as extended) of the token after this one
    for token_id, piece, (start, end), text_idx, word_idx, is_special in reversed(rows):
        if text_idx is None or is_special:
            placed.append(PlacedToken(token_id, piece, 0, 0, None, None))
            continue
        said, extended = last_end[text_idx]
        whole = extended if end == said else _over_joined(texts[text_idx], end, next_start[text_idx])
        last_end[text_idx] = (end, whole)
        next_start[text_idx] = start
        placed.append(PlacedToken(token_id, piece, start, whole, text_idx, word_idx))
    return placed[::-1]


def _over_joined(text: str, end: int, next_start: int) -> int:
    """The end moved over characters that belong to no token, up to a space."""
    while end < next_start and not text[end].isspace():
        end += 1
    return end


def trim(text: str, start: int, end: int) -> tuple[int, int]:
    """[start, end) without white space at its ends; as it was when there is nothing else."""
    inner = text[start:end]
    if not inner.strip():
        return start, end
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())


def window_starts(num_tokens: int, size: int, overlap: int) -> range:
    """Where each window begins: `size` tokens or less, `overlap` of them shared with the window before.

    >>> list(window_starts(10, 4, 1))
    [0, 3, 6]"""
    assert 0 <= overlap < size
    return range(0, max(1, num_tokens - overlap), size - overlap)


def split(tokens: Sequence[PlacedToken], text_idx: int) -> tuple[int, int]:
    """[begin, end) of the tokens of one text: what stands before and after them is the same in each window."""
    mine = [i for i, token in enumerate(tokens) if token.text_idx == text_idx]
    return (mine[0], mine[-1] + 1) if mine else (len(tokens), len(tokens))
