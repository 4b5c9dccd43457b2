"""A transformers GenerationConfig as fields of our bodies: `transformers chat` sends one with every message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deploy.errors import InvalidRequest, invalid

# transformers.GenerationConfig -> our field. A field that the body sets itself wins.
_FIELDS: Mapping[str, str] = {
    "max_new_tokens": "max_completion_tokens",
    "min_new_tokens": "min_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
}
# What says nothing about the text, or is ours to know.
_IGNORED = frozenset(
    {"transformers_version", "bos_token_id", "pad_token_id", "use_cache", "cache_implementation", "do_sample"}
)


def from_generation_config(config: Any) -> dict[str, Any]:
    """Fields of a chat body for a GenerationConfig as JSON text or object. Raises InvalidRequest for what we lack."""
    param = "generation_config"
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError):
            raise invalid(param, "not JSON") from None
    if not isinstance(config, dict):
        raise invalid(param, f"expected an object, got {type(config).__name__}")
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if value is None or name in _IGNORED or name.startswith("_"):
            continue
        if name not in _FIELDS:
            raise InvalidRequest(f"{param}.{name[:100]}: not supported; remove it", param=param)
        fields[_FIELDS[name]] = value
    if isinstance(fields.get("stop_token_ids"), int):
        fields["stop_token_ids"] = [fields["stop_token_ids"]]
    if config.get("do_sample") is False:
        fields["temperature"] = 0
    return fields
