"""Classification by a causal model without a trained head: how likely is each label as a continuation of the text?

    log P(label | text) = sum over the label's tokens of log P(token | text, the label's tokens before it)

The text's tokens stay the same for all labels; a label is tokenized apart from it, within its template.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence

from deploy.errors import EngineError, InvalidRequest, invalid
from deploy.logprobs import finite
from deploy.pooling import PoolingBody, check_length, side_by_side
from deploy.router_pool import GenerateRequest
from deploy.served_model import ServedModel
from deploy.service import Service
from model.sampling_params import SamplingParams

_REMEDY = "shorten it, the labels or their template"


async def label_log_likelihoods(
    service: Service,
    model: ServedModel,
    prompts: Sequence[list[int]],
    labels: Sequence[str],
    template: str,
    body: PoolingBody | None = None,
    *,
    names: tuple[str, str] = ("input", "labels"),
) -> list[list[float]]:
    """For each prompt the natural log-likelihood of each label in its template. names: what the body calls texts and
    labels. Raises InvalidRequest."""
    if template.count("{}") != 1:
        raise InvalidRequest("the template of a label must have {} exactly once", param="label_template")
    if not labels or len(set(labels)) != len(labels) or not all(labels):
        raise invalid("labels", "send at least one; each with text, and each once")
    if (num_runs := len(prompts) * len(labels)) > service.settings.limits.max_prompts:
        limit = service.settings.limits.max_prompts
        raise InvalidRequest(f"labels: {num_runs} texts times labels are more than this server's {limit}")
    num_chars = sum(map(len, labels)) + len(labels) * len(template)
    if num_chars > (most := service.settings.limits.max_body_bytes):
        raise invalid("labels", f"in their template they have {num_chars} characters, more than this server's {most}")

    def read_one(label: str) -> list[int]:
        text = template.replace("{}", label)
        # Beside one token of a text, and the one that is drawn to end the request.
        check_length(model, model.tokenizer.least_num_tokens(text) + 2, names[1], _REMEDY)
        ending = model.tokenizer.encode(text, add_special_tokens=False)
        check_length(model, len(ending) + 2, names[1], _REMEDY)
        return ending

    endings = await service.read(lambda: [read_one(label) for label in labels], num_chars)
    check_length(model, max(map(len, prompts)) + max(map(len, endings)) + 1, names[0])
    deadline, body = service.deadline(), body or PoolingBody()

    async def likelihood(numbered: tuple[int, tuple[list[int], list[int]]]) -> float:
        number, (prompt_ids, ending) = numbered
        whole = prompt_ids + ending
        request = GenerateRequest(
            model=model.names[0],
            prompt_ids=whole,
            sampling=SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0).to_dict(),
            deadline=deadline,
            priority=body.priority,
            cache_salt=body.cache_salt,
            is_further=number > 0,
        )
        with service.pool.metrics.watch(len(whole), model.names[0], {}) as watch:
            async with contextlib.aclosing(service.pool.generate(request)) as chunks:
                async for chunk in chunks:
                    watch.saw(chunk)
                    if chunk.prompt_logprobs is not None:
                        watch.ended = "stop"
                        chosen = chunk.prompt_logprobs[len(whole) - len(ending) :]
                        return math.fsum(finite(one[0][1]) for one in chosen if one)
        raise EngineError(500, "engine_error", "the router returned no log-probabilities")

    flat = await side_by_side(likelihood, enumerate(itertools.product(prompts, endings)))
    return [flat[i : i + len(labels)] for i in range(0, len(flat), len(labels))]
