"""What a request asks of the sampler, validated once, and how it travels as JSON. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, cast, get_args

StructuredKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
_KINDS: tuple[str, ...] = get_args(StructuredKind)
_GREEDY_BELOW = 1e-5  # vLLM's rule: a smaller temperature is greedy


@dataclass(frozen=True, slots=True)
class StructuredSpec:
    """A constraint on the whole output.

    payload: json_schema: the schema as JSON; json_object: empty; regex: the pattern; choice: a JSON list of strings;
    grammar: a Lark grammar (as llguidance reads it).
    """

    kind: StructuredKind
    payload: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"structured.kind must be one of {', '.join(_KINDS)}, got {self.kind!r}.")
        _check(isinstance(self.payload, str), "structured.payload", "a string", type(self.payload).__name__)
        if not self.payload and self.kind != "json_object":
            raise ValueError(f"structured.payload must not be empty for kind {self.kind!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw a request's tokens and when to stop. Raises ValueError with name, rule and value.

    Order of effects, as in vLLM: grammar and allowed_token_ids, bad words and min_tokens, logit_bias, penalties,
    temperature, min_p, top_k, top_p (over what min_p and top_k left).
    """

    temperature: float = 1.0  # below 1e-5: greedy, ties to the lowest token id
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over output
    presence_penalty: float = 0.0  # over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0  # no end-of-sequence or stop token before this many output tokens
    max_tokens: int | None = None  # None: up to the context length
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None  # number of top alternatives; 0: only the chosen token's
    prompt_logprobs: int | None = None
    structured: StructuredSpec | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            _check_number(name, getattr(self, name))
        _check(self.temperature >= 0, "temperature", "non-negative", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _check(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _check(self.repetition_penalty > 0, "repetition_penalty", "greater than zero", self.repetition_penalty)
        _check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]", self.frequency_penalty)
        _check(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]", self.presence_penalty)
        _check_count("top_k", self.top_k, least=1, remedy=" Leave it out to consider every token.")
        _check_count("max_tokens", self.max_tokens, least=1)
        _check_count("min_tokens", self.min_tokens, least=0, optional=False)
        _check_count("logprobs", self.logprobs, least=0)
        _check_count("prompt_logprobs", self.prompt_logprobs, least=0)
        if self.max_tokens is not None:
            rule = f"less than or equal to max_tokens={self.max_tokens}"
            _check(self.min_tokens <= self.max_tokens, "min_tokens", rule, self.min_tokens)
        _check(_is_int(self.seed) and -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer", self.seed)
        _check(isinstance(self.ignore_eos, bool), "ignore_eos", "true or false", self.ignore_eos)
        self._check_tokens()

    def _check_tokens(self) -> None:
        _check_token_ids("stop_token_ids", self.stop_token_ids)
        _check_token_ids("logit_bias", self.logit_bias)
        for token, bias in self.logit_bias.items():
            _check_number(f"logit_bias[{token}]", bias)
            _check(-100 <= bias <= 100, f"logit_bias[{token}]", "in [-100, 100]", bias)
        for word in self.bad_words_ids:
            _check_token_ids("bad_words_ids", word)
            _check(len(word) > 0, "bad_words_ids", "sequences of at least one token id", word)
        if self.allowed_token_ids is not None:
            _check_token_ids("allowed_token_ids", self.allowed_token_ids)
            _check(len(self.allowed_token_ids) > 0, "allowed_token_ids", "non-empty when given", "[]")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when a token id given by the user isn't in [0, vocab_size)."""
        groups: list[tuple[str, Iterable[int]]] = [
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            *(("bad_words_ids", word) for word in self.bad_words_ids),
        ]
        for name, token_ids in groups:
            for token in token_ids:
                _check(token < vocab_size, name, f"token ids below the vocabulary size {vocab_size}", token)

    def to_dict(self) -> dict[str, Any]:
        """Everything that differs from the defaults, as JSON can carry it."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["structured"] = None if self.structured is None else asdict(self.structured)
        return {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """The inverse of to_dict. Raises ValueError for an unknown name or a value out of its rule."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown sampling parameter {unknown[0]!r}; known: {', '.join(sorted(known))}.")
        given = dict(values)
        if "logit_bias" in given:
            given["logit_bias"] = _token_biases(given["logit_bias"])
        for name in ("bad_words_ids", "allowed_token_ids", "stop_token_ids"):
            if given.get(name) is not None:
                given[name] = _sequence(name, given[name])
        if "bad_words_ids" in given:
            given["bad_words_ids"] = tuple(_sequence("bad_words_ids", word) for word in given["bad_words_ids"])
        if given.get("structured") is not None:
            given["structured"] = _structured(given["structured"])
        return cls(**given)


def _structured(value: Any) -> StructuredSpec:
    if not isinstance(value, Mapping) or not set(value) <= {"kind", "payload"} or "kind" not in value:
        raise ValueError(f"structured must be an object with kind and payload, got {value!r:.200}.")
    return StructuredSpec(cast(StructuredKind, value["kind"]), value.get("payload", ""))


def _token_biases(value: Any) -> dict[int, float]:
    _check(isinstance(value, Mapping), "logit_bias", "an object of token id to bias", f"{value!r:.200}")
    try:
        return {int(token): bias for token, bias in value.items()}  # JSON's keys are strings
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias must have token ids as keys, got {list(value)!r:.200}.") from None


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    _check(isinstance(value, (list, tuple)), name, "a list", f"{value!r:.200}")
    return tuple(value)


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, float) or _is_int(value)
    _check(is_number and math.isfinite(cast(float, value)), name, "a finite number", value)


def _check_count(name: str, value: object, *, least: int, optional: bool = True, remedy: str = "") -> None:
    if value is None and optional:
        return
    if not _is_int(value) or cast(int, value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value}.{remedy}")


def _check_token_ids(name: str, token_ids: Iterable[object]) -> None:
    for token in token_ids:
        _check(_is_int(token) and 0 <= cast(int, token) < 2**31, name, "made of token ids (0 or more)", token)


_DEFAULTS = SamplingParams()
