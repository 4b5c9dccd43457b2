"""/v1/embeddings: the last token's hidden state, L2-normalized, as vLLM does it for causal models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from deploy.pooling import (
    EMBEDDING_KINDS,
    PoolingBody,
    encode_values,
    list_answer,
    normalized,
    read_inputs,
    refuse_dimensions,
    run_head,
)
from deploy.served_model import ServedModel
from deploy.service import Service


class EmbeddingRequest(PoolingBody):
    """OpenAI's body, with vLLM's extensions."""

    input: Any = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    use_activation: bool | None = None  # false: not normalized


async def embed(service: Service, body: EmbeddingRequest, answer_id: str) -> dict[str, Any]:
    refuse_dimensions(body.dimensions)
    model = service.models.find_for(EMBEDDING_KINDS, body.model, "embeddings")
    prompts = await read_inputs(service, model, body, body.input, "input")
    rows = await embeddings(service, model, prompts, body, normalize=body.use_activation is not False)
    data = [
        {"index": index, "object": "embedding", "embedding": encode_values(row, body.encoding_format)}
        for index, row in enumerate(rows)
    ]
    return list_answer(service, answer_id, body.model or model.names[0], data, prompts)


async def embeddings(
    service: Service, model: ServedModel, prompts: Sequence[list[int]], body: PoolingBody, *, normalize: bool = True
) -> list[list[float]]:
    """One vector of hidden_size numbers for each prompt."""
    batch = await run_head(service, model, prompts, body, head="", tokens="last")
    return [normalized(rows[0]) if normalize else rows[0] for rows in batch]
