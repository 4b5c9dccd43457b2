"""Log-probabilities in the shapes of the three APIs: completions, chats, and vLLM's prompt_logprobs.

What grows with the alternatives is made while the JSON is written: other threads have their turns in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from actors.request import Alternatives
from deploy.generation import Token
from model.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON hasn't got


def completion_logprobs(
    tokens: Sequence[Token], tokenizer: Tokenizer, *, num_top: int, as_ids: bool = False
) -> dict[str, Any] | None:
    """Parallel lists over the tokens. `top_logprobs` also has the token itself."""
    if not tokens:
        return None

    def top(alternatives: Alternatives) -> dict[str, float]:
        shown = [*most_likely(alternatives, num_top), alternatives[0]]
        by_name = {_name(tokenizer, one[0], as_ids): finite(one[1]) for one in reversed(shown)}
        return dict(sorted(by_name.items(), key=lambda item: -item[1]))

    return {
        "text_offset": [token.text_offset for token in tokens],
        "token_logprobs": [
            None if token.alternatives is None else finite(token.alternatives[0][1]) for token in tokens
        ],
        "tokens": [_name(tokenizer, token.token_id, as_ids) for token in tokens],
        "top_logprobs": (None if token.alternatives is None else top(token.alternatives) for token in tokens),
    }


def chat_logprobs(
    tokens: Sequence[Token], tokenizer: Tokenizer, *, num_top: int, as_ids: bool = False
) -> dict[str, Any]:
    def entry(one: tuple[int, float, int]) -> dict[str, Any]:
        data = tokenizer.token_bytes(one[0])
        text = f"token_id:{one[0]}" if as_ids else data.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(one[1]), "bytes": list(data)}

    content = (
        {**entry(chosen[0]), "top_logprobs": [entry(one) for one in most_likely(chosen, num_top)]}
        for chosen in (token.alternatives for token in tokens)
        if chosen
    )
    return {"content": content, "refusal": None}


def prompt_logprobs(per_token: Sequence[Alternatives | None], tokenizer: Tokenizer) -> Iterator[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token a dict from token id to its logprob, rank and text; None for the first."""
    for alternatives in per_token:
        if alternatives is None:
            yield None
            continue
        yield {
            str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}
            for token_id, logprob, rank in alternatives
        }


def prompt_tokens(
    prompt_ids: Sequence[int], per_token: Sequence[Alternatives | None], tokenizer: Tokenizer
) -> list[Token]:
    """The prompt as tokens with offsets, for `echo` with logprobs."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    tokens = []
    offset = 0
    for token_id, alternatives in zip(prompt_ids, per_token, strict=True):
        tokens.append(Token(token_id, offset, alternatives or None))
        offset += len(detokenizer.push(token_id))
    return tokens


def most_likely(alternatives: Alternatives, num_top: int) -> Alternatives:
    """The num_top most likely, each once: the chosen token may be among them."""
    by_id = {one[0]: one for one in alternatives}
    return sorted((one for one in by_id.values() if one[2] <= num_top), key=lambda one: one[2])


def _name(tokenizer: Tokenizer, token_id: int, as_ids: bool) -> str:
    """OpenAI writes tokens that aren't whole characters as `bytes:\\xe2\\x80`, so that they stay apart."""
    if as_ids:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return max(LOWEST, logprob)  # NaN too
