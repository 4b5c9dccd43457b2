"""Structured output: grammars compiled with llguidance, and a matcher for each request.

A matcher says which tokens may come next. The request thread compiles (milliseconds, up to about half a second for a
giant schema); the step thread only fills bitmasks and accepts tokens, tens of microseconds each. Both release the GIL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from torch import Tensor

from model.sampling_params import StructuredSpec
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_PAYLOAD_CHARS = 128 * 1024
_MAX_MESSAGE_CHARS = 400
_CACHED_GRAMMARS = 64
# The converter from GBNF is Python, and may take the product of the two: about a second of the GIL at the most.
_MAX_GBNF_RULES = 300
_MAX_GBNF_CHARS = 16 * 1024
_LARK_LINE = re.compile(r"^[^\S\n]*(%llguidance\b|start\s*:)", re.MULTILINE)
# JSON allows whitespace without end, and a small model may never stop writing it.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ \t\n\r]{1,40}"}


class Matcher:
    """Where one request stands in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = (vocab_size + 31) // 32

    def bitmask(self) -> Tensor:
        """The tokens that may come next: int32 [ceil(V / 32)], bit i of word w for token 32 * w + i.

        Where the output may end, the end-of-sequence tokens are among them.
        """
        words = torch.zeros(self._num_words, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        return words

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False if the grammar doesn't allow it or a limit was hit; then `error` says why."""
        return bool(self._matcher.consume_token(token_id))

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why matching failed for good, or None. Look after bitmask() and after accept()."""
        return _shorten(self._matcher.get_error()) if self._matcher.is_error() else None


class GrammarCompiler:
    """Compiles specs for one tokenizer, and remembers the last ones. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """vocab_size is the width of the logits, which may exceed the tokenizer's.

        A tokenizer that can't be used, or has none of the end tokens, is what `compile` raises then."""
        num_tokens = tokenizer.backend.get_vocab_size(with_added_tokens=True)
        eos = [token_id for token_id in eos_token_ids if token_id < num_tokens]
        self._tokenizer: LLTokenizer | None = None
        self._refusal = "the model's tokenizer has no end-of-sequence token; name one in generation_config.json"
        if eos:
            try:
                self._tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=eos)
            except ValueError as error:
                self._refusal = f"the model's tokenizer.json doesn't work: {_shorten(str(error))}"
        self._vocab_size = vocab_size
        # Messages go to clients: no parser state in them. The other limits bound a grammar's size, and one mask to
        # a few milliseconds.
        self._limits = LLParserLimits(
            verbose_errors=False, max_grammar_size=100_000, step_max_items=20_000, max_lexer_states=50_000
        )
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)

    def compile(self, spec: StructuredSpec) -> Matcher:
        """A matcher at the start of the grammar. Raises ValueError with the reason if the grammar can't be used."""
        return Matcher(self._compiled(spec).deep_copy(), self._vocab_size)

    def _compile(self, spec: StructuredSpec) -> LLMatcher:
        if self._tokenizer is None:
            raise ValueError(f"structured output can't be used: {self._refusal}")
        if len(spec.payload) > MAX_PAYLOAD_CHARS:
            raise ValueError(f"{spec.kind} must be at most {MAX_PAYLOAD_CHARS} characters, got {len(spec.payload)}.")
        matcher = LLMatcher(self._tokenizer, _grammar(spec), log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask is the slowest; its lexer states are kept in the copies
        if matcher.is_error():
            raise ValueError(f"{spec.kind} can't be used: {_shorten(matcher.get_error())}")
        return matcher


def _grammar(spec: StructuredSpec) -> str:
    """The spec in llguidance's own language."""
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.payload)
    if spec.kind == "grammar":
        return LLMatcher.grammar_from_lark(spec.payload if is_lark(spec.payload) else _lark(spec.payload))
    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=_JSON_OPTIONS)
    value = _parse_json(spec)
    if spec.kind == "json_schema":
        if value is True:
            value = {}
        if not isinstance(value, dict):
            raise ValueError(f"json_schema must be a JSON object, got {value!r:.100}.")
        # From the parsed value, not the text: llguidance pastes the text into a larger document.
        return LLMatcher.grammar_from_json_schema(value, defaults=_JSON_OPTIONS)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"choice must be a JSON list of one or more non-empty strings, got {value!r:.100}.")
    choices = " | ".join(json.dumps(item, ensure_ascii=False) for item in value)
    return LLMatcher.grammar_from_lark("start: " + choices.replace("\x7f", "\\u007f"))  # Lark wants that one escaped


def is_lark(grammar: str) -> bool:
    """As llguidance tells Lark from GBNF, but its pattern is quadratic in newlines, and holds the GIL."""
    return _LARK_LINE.search(grammar) is not None


def _lark(gbnf: str) -> str:
    num_rules = gbnf.count("::=")
    if num_rules > _MAX_GBNF_RULES or len(gbnf) > _MAX_GBNF_CHARS:
        raise ValueError(
            f"grammar in GBNF must have at most {_MAX_GBNF_RULES} rules and {_MAX_GBNF_CHARS} characters, "
            f"got {num_rules} and {len(gbnf)}; write it in Lark, with a rule 'start:'."
        )
    try:
        return gbnf_to_lark(gbnf)
    except Exception as error:  # the converter raises bare Exception
        raise ValueError(f"grammar is neither Lark, with a rule 'start:', nor GBNF: {_shorten(str(error))}") from None


def _parse_json(spec: StructuredSpec) -> object:
    try:
        return json.loads(spec.payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{spec.kind} must be valid JSON: {_shorten(str(error))}") from None


def _shorten(message: str) -> str:
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[: _MAX_MESSAGE_CHARS - 3] + "..."
