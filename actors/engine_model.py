"""The loaded model, as an engine's steps compute with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.decoder import Decoder
from model.heads import Head
from model.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """What a step computes with. heads: by served model name; `lm_head` is None for a backbone without one."""

    decoder: Decoder
    lm_head: Head | None
    heads: Mapping[str, Head]
    kv_cache: KVCache
    device: torch.device
    max_model_len: int
    eos_token_ids: tuple[int, ...]
