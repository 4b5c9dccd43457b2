"""Typed reads of a JSON object's fields. An absent or null one has its default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Far beyond what any model has, and so near that no product of a few of them leaves float64.
_MOST_COUNT = 2**31 - 1
_LEAST_NUMBER, _MOST_NUMBER = 1e-30, 1e30
_POSITIVE = f"a number above 0, from {_LEAST_NUMBER} to {_MOST_NUMBER}"


class ConfigFields:
    """Each read raises ValueError with name, value and rule; `where` stands before the names, as in "rope_scaling."."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = values
        self._where = where

    def count(self, name: str, default: int, least: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_COUNT:
            raise self._error(name, value, f"an integer of at least {least}, and at most {_MOST_COUNT}")
        return value

    def optional_count(self, name: str) -> int | None:
        return None if self._values.get(name) is None else self.count(name, 0, least=0)

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0; a `default` of None means that there is none."""
        value = self._value(name, default)
        if not _is_positive(value):
            raise self._error(name, value, _POSITIVE)
        return float(value)

    def positives(self, name: str, length: int) -> tuple[float, ...]:
        value = self._value(name, None)
        if not isinstance(value, list) or len(value) != length or not all(map(_is_positive, value)):
            raise self._error(name, value, f"a list of {length} numbers, each {_POSITIVE}")
        return tuple(map(float, value))

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """One of these, or None; names of torch dtypes may begin with "torch."."""
        value = self._values.get(name)
        short = value.removeprefix("torch.") if isinstance(value, str) else value
        if short is not None and short not in choices:
            raise ValueError(f"{self._where}{name} {value!r} is not implemented: expected one of {', '.join(choices)}")
        return short

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def _error(self, name: str, value: Any, rule: str) -> ValueError:
        return ValueError(f"{self._where}{name} {value!r} must be {rule}; correct config.json")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _LEAST_NUMBER <= value <= _MOST_NUMBER
