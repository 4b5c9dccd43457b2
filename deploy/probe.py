"""One request to a service that has just come up."""

from __future__ import annotations

import json
import time
import urllib.request


def first_token_s(url: str, model: str, api_key: str | None = None) -> float:
    """Seconds from sending a one-token completion to having it."""
    body = json.dumps({"model": model, "prompt": "The", "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    began = time.monotonic()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=60) as answer:
        answer.read()
    return time.monotonic() - began
