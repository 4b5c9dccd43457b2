"""API keys: `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients send it."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers

from deploy.errors import InvalidApiKey

OPEN_PATHS = frozenset({"/", "/mesh/view", "/health", "/ping", "/ready"})


def all_keys(keys: Sequence[str], file: str | None) -> list[str]:
    """The keys given and those in the file, one a line. Raises ValueError where the file can't be used."""
    found = list(keys)
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"server.api_key_file = {file!r}: {error}; give a readable file of ASCII keys") from None
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ValueError(f"server.api_key_file = {file!r} has no key, which would let everybody in; add one")
    return found


class ApiKeys:
    """The accepted keys; with none, everybody is let in. Keys are compared as hashes, all of them, in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def check(self, path: str, headers: Headers) -> str:
        """Who is asking, as an opaque name to count by. Raises InvalidApiKey."""
        if not self._hashes:
            return "anyone"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _hash(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        found = [hmac.compare_digest(given, one) for one in self._hashes]
        if not any(found) and path not in OPEN_PATHS:
            raise InvalidApiKey("Incorrect or missing API key. Send one as `Authorization: Bearer KEY`.")
        return given.hex()[:16]


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
