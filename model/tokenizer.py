"""Text to tokens and back: `tokenizer.json` with its special tokens, and text that grows one token at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from model.chat_template import ChatTemplate, find_templates


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads.

    `config` is tokenizer_config.json; `chat_template` is None when the checkpoint has none."""

    def __init__(self, backend: Backend, config: dict[str, Any], chat_template: ChatTemplate | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.config = config
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.max_token_id = max(vocab.values(), default=-1)
        self._longest_token_chars = max(map(len, vocab), default=1)

    @classmethod
    def from_directory(
        cls, directory: str | Path, *, vocab_size: int | None = None, chat_template_file: str | Path | None = None
    ) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and the chat template, wherever it is.

        Raises ValueError (one line) when a file is missing or broken, or a token doesn't fit into `vocab_size`."""
        tokenizer = cls.without_template(directory)
        config = tokenizer.config
        tokens = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        if templates := find_templates(Path(directory), config, chat_template_file):
            tokenizer.chat_template = ChatTemplate(templates, {name: token or "" for name, token in tokens.items()})
        if vocab_size is not None and tokenizer.max_token_id >= vocab_size:
            raise ValueError(
                f"{directory}/tokenizer.json: token id {tokenizer.max_token_id} is outside the model's "
                f"vocab_size = {vocab_size}; the tokenizer belongs to another model"
            )
        return tokenizer

    @classmethod
    def without_template(cls, directory: str | Path) -> Tokenizer:
        """As `from_directory`, for those who render no chats."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; save a fast tokenizer (tokenizer.json) beside the checkpoint")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer ({' '.join(str(error).split())[:200]})") from None
        config_path = path.with_name("tokenizer_config.json")
        try:
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{config_path}: not JSON ({error})") from None
        if not isinstance(config, dict):
            raise ValueError(f"{config_path}: expected an object, found {type(config).__name__}")
        return cls(backend, config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Raises ValueError for text that isn't Unicode (lone surrogates)."""
        try:
            # Of the library's ways to encode, only the batch gives up the GIL: other threads go on meanwhile.
            ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (UnicodeEncodeError, TypeError):
            raise ValueError("the text has a lone surrogate, which is not a character; remove it") from None
        return ids

    def least_num_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens, at no cost. Normalizing may make a text up to four times shorter."""
        return len(text) // (4 * self._longest_token_chars)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the ids; ids that the tokenizer doesn't know are skipped."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text: possibly a part of a character. Empty for unknown ids."""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if (byte := self.fallback_bytes.get(token_id)) is not None:
            return bytes([byte])
        if not self.is_byte_level:
            return self.decode([token_id]).encode()
        try:
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:
            return str(token).encode()

    def token_text(self, token_id: int) -> str:
        """The token as text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def end_ids(self, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids that the model's configuration names, and that of the tokenizer's own `eos_token`: as in vLLM."""
        token = _content(self.config.get("eos_token"))
        own = None if token is None else self.backend.token_to_id(token)
        return tuple(dict.fromkeys([*eos_token_ids, *([] if own is None else [own])]))

    def detokenizer(self, *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are bytes in GPT-2's alphabet, as in all Qwen models."""
        return bool(self._decoder["type"] == "ByteLevel")

    @cached_property
    def fallback_bytes(self) -> dict[int, int]:
        """The bytes by token id, where <0x00> to <0xFF> stand for what has no token, as in sentencepiece models."""
        decoders = [self._decoder, *self._decoder.get("decoders", ())]
        ids = {self.backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        is_known = any(decoder["type"] == "ByteFallback" for decoder in decoders) and None not in ids
        return {token_id: byte for token_id, byte in ids.items() if token_id is not None} if is_known else {}

    @cached_property
    def _decoder(self) -> dict[str, Any]:
        decoder: dict[str, Any] = json.loads(self.backend.to_str())["decoder"] or {"type": None}
        return decoder


class IncrementalDetokenizer:
    """Text of a growing token sequence, O(1) per token: the pieces joined are `decode` of all tokens.

    A character that is cut off between tokens is held back until it is whole, or `finish` gives it up as U+FFFD.
    Where <0xNN> tokens are no UTF-8, only the broken characters become that; `decode` gives up all of their run."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop_id = next((token_id for token_id, byte in tokenizer.fallback_bytes.items() if byte == ord(".")), -1)
        self._pending: list[int] = []  # without byte level: tokens whose text isn't out yet

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        if token_id in self._skip:
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if token_id in self._tokenizer.fallback_bytes:
            # The stream would fail at bytes that are no character: it sees a full stop in their place.
            return self._step(self._stop_id)[:-1] + self._utf8.decode(self._tokenizer.token_bytes(token_id))
        return self._utf8.decode(b"", final=True) + self._step(token_id)

    def finish(self) -> str:
        """What was held back."""
        text = self._tokenizer.decode(self._pending) + self._utf8.decode(b"", final=True)
        self._pending.clear()
        return text

    def _step(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer.backend, token_id)
        if text is None:
            return ""
        self._pending.clear()
        return str(text)


def _content(token: Any) -> str | None:
    """A token in tokenizer_config.json is text or an AddedToken's dict."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable alphabet for bytes: printable Latin-1 stands for itself, the rest is at U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF_CHAR = _byte_alphabet()
