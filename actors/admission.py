"""From a request to a sequence that may be scheduled, or the reason why this model can't serve it."""

from __future__ import annotations

from functools import partial

from actors.blocks import BlockManager
from actors.engine_model import EngineModel
from actors.request import Chunk, GenerateRequest, Request, error_chunk
from actors.sequence import Sequence
from model.sampler_state import SamplerState
from model.structured import Matcher


def admit(
    request: Request,
    model: EngineModel,
    blocks: BlockManager,
    *,
    owner: str,
    arrival: int,
    deadline: float,
    matcher: Matcher | None,
) -> Sequence | Chunk:
    """The sequence, which has no blocks yet, or an error for whoever asked. See `Sequence` for the options."""
    refuse = partial(error_chunk, request.request_id)
    tokens = [*request.prompt_ids, *(request.output_ids if isinstance(request, GenerateRequest) else ())]
    if not tokens:
        return refuse(400, "empty_prompt", "the prompt has no tokens; give at least one")
    limit = model.max_model_len - (1 if isinstance(request, GenerateRequest) else 0)
    if len(tokens) > limit:
        message = (
            f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has "
            f"{len(request.prompt_ids)}. Shorten the prompt."
        )
        return refuse(400, "context_length_exceeded", message)
    vocab_size = model.decoder.config.vocab_size
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        bad = next(t for t in tokens if not 0 <= t < vocab_size)
        return refuse(400, "invalid_token_id", f"token id {bad} is not in the vocabulary (0 to {vocab_size - 1})")
    sequence = Sequence(
        request=request,
        owner=owner,
        arrival=arrival,
        deadline=deadline,
        table=blocks.new_table(),
        scope=request.cache_salt if blocks.prefix_caching else request.prompt_id,
        matcher=matcher,
        token_ids=tokens,
    )
    if isinstance(request, GenerateRequest):
        if model.lm_head is None:
            return refuse(400, "task_not_supported", "this model generates no text")
        try:
            request.sampling.check_vocabulary(vocab_size)
        except ValueError as error:
            return refuse(400, "invalid_token_id", str(error)[:500])
        sequence.sampler = SamplerState(request.sampling, request.prompt_ids, request.output_ids, model.eos_token_ids)
        if request.output_ids:  # a replay: the first router told of all but the last one, which has not gone through
            sequence.num_routed = len(tokens) - 1
        for token in request.output_ids:
            if matcher is not None:
                matcher.accept(token)
    elif request.head and request.head not in model.heads:
        return refuse(404, "model_not_found", f"no head {request.head!r} on this router")
    elif request.head and request.tokens == "last":
        sequence.token_ids = list(model.heads[request.head].classified_part(tokens))
    return sequence
