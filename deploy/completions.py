"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deploy.endpoints import TextEndpoint
from deploy.generation import Delta, TextPlan
from deploy.generation_plan import (
    Asked,
    plan_requests,
    read_prompt,
    structured_spec,
)
from deploy.logprobs import completion_logprobs, prompt_logprobs, prompt_tokens
from deploy.openai_answers import Usage, answer_head, stream_chunks
from deploy.openai_requests import CompletionRequest
from deploy.pooling import one_or_many
from deploy.served_model import ServedModel
from deploy.service import Service


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionPlan(TextPlan):
    """`texts` are the prompts as text, to echo; `head` is what every chunk of the answer begins with."""

    body: CompletionRequest
    texts: list[str]
    head: dict[str, Any]


async def plan_completion(service: Service, body: CompletionRequest, answer_id: str) -> CompletionPlan:
    """Tokenizes and checks everything. Raises ApiError."""
    model = service.models.find_generator(body.model)
    sent = one_or_many(body.prompt, "prompt")
    prompts, texts = await service.read(lambda: _read_prompts(body, model, sent), sum(len(prompt) for prompt in sent))
    asked_prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        asked_prompt_logprobs = max(body.logprobs, body.prompt_logprobs or 0)
    asked = Asked(
        max_tokens=body.max_tokens,
        clamps_max_tokens="max_tokens" not in body.model_fields_set,
        logprobs=body.logprobs,
        prompt_logprobs=asked_prompt_logprobs,
        structured=structured_spec(body),
    )
    return CompletionPlan(
        body=body,
        model=model,
        requests=plan_requests(body, model, prompts, asked, service.settings.limits, service.deadline()),
        texts=texts,
        head=answer_head(service, body, model, answer_id, "text_completion"),
    )


def complete(plan: CompletionPlan, deltas: list[Delta]) -> dict[str, Any]:
    """The whole answer."""
    usage = Usage(plan.requests)
    for delta in deltas:
        usage.count(delta)
    choices = (_Choice(plan, index).render(delta, streaming=False) for index, delta in enumerate(deltas))
    return {**plan.head, "choices": choices, "usage": usage.to_dict()}


def complete_stream(service: Service, plan: CompletionPlan) -> AsyncGenerator[bytes]:
    """The answer as server-sent events."""
    choices = [_Choice(plan, index) for index in range(len(plan.requests))]

    def show(delta: Delta) -> Iterator[dict[str, Any]]:
        choice = choices[delta.index]
        if choice.has_news(delta):
            yield {"choices": [choice.render(delta, streaming=True)]}

    return stream_chunks(service, plan, plan.head, plan.body.stream_options, show)


class _Choice:
    """One choice of the answer: remembers whether its prompt has been shown."""

    def __init__(self, plan: CompletionPlan, index: int) -> None:
        self._plan = plan
        self._index = index
        self._is_first = True

    def has_news(self, delta: Delta) -> bool:
        return bool(self._is_first or delta.text or delta.tokens or delta.routed_experts or delta.finish_reason)

    def render(self, delta: Delta, *, streaming: bool) -> dict[str, Any]:
        plan, body = self._plan, self._plan.body
        tokenizer = plan.model.tokenizer
        prompt_ids = plan.requests[self._index].prompt_ids
        is_first, self._is_first = self._is_first, False
        tokens, text = delta.tokens, delta.text
        echo = plan.texts[self._index // (body.n or 1)] if body.echo else ""
        if body.logprobs is None:
            logprobs = None
        else:
            shown = [replace(token, text_offset=token.text_offset + len(echo)) for token in tokens]
            if body.echo and is_first and delta.prompt_logprobs is not None:
                shown = prompt_tokens(prompt_ids, delta.prompt_logprobs, tokenizer) + shown
            logprobs = completion_logprobs(
                shown, tokenizer, num_top=body.logprobs, as_ids=bool(body.return_tokens_as_token_ids)
            )
        choice: dict[str, Any] = {
            "index": self._index,
            "text": echo + text if is_first else text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, tokenizer)
        if body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
            choice["prompt_token_ids"] = prompt_ids if is_first or not streaming else None
        if body.return_routed_experts and delta.routed_experts is not None:
            choice["routed_experts"] = delta.routed_experts
        return choice


def _read_prompts(
    body: CompletionRequest, model: ServedModel, sent: Sequence[str | list[int]]
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt and, to echo, its text."""
    prompts: list[list[int]] = []
    texts: list[str] = []
    for prompt in sent:
        ids = read_prompt(prompt, body, model, body.max_tokens, "prompt")
        prompts.append(ids)
        if body.echo:
            is_whole = isinstance(prompt, str) and body.truncate_prompt_tokens is None
            texts.append(str(prompt) if is_whole else model.tokenizer.decode(ids))
    return prompts, texts


COMPLETIONS: TextEndpoint[CompletionRequest, CompletionPlan] = TextEndpoint(
    body=CompletionRequest, id_prefix="cmpl-", plan=plan_completion, answer=complete, stream=complete_stream
)
