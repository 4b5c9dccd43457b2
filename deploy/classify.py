"""/classify: labels with probabilities, from a trained head, or on request from any causal model's likelihoods."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from deploy.label_likelihood import label_log_likelihoods
from deploy.openai_requests import ListOf
from deploy.pooling import PoolingBody, activate, activation_of, list_answer, read_inputs, run_head
from deploy.service import Service


class ClassifyRequest(PoolingBody):
    """vLLM's body, and `labels`: with them a causal model classifies, by how likely each label is after the text.

    `label_template` is how a label follows the text; it has "{}" once."""

    input: Any = None
    use_activation: bool | None = None  # false: outputs of the head, or log-likelihoods, in place of probabilities
    labels: ListOf[str] | None = Field(default=None, min_length=1, max_length=1000)
    label_template: str | None = Field(default=None, max_length=10_000)


async def classify(service: Service, body: ClassifyRequest, answer_id: str) -> dict[str, Any]:
    if body.labels is None and body.label_template is None:
        model = service.models.find_for(("sequence_classification",), body.model, "classification without `labels`")
        prompts = await read_inputs(service, model, body, body.input, "input")
        rows = [rows[0].tolist() for rows in await run_head(service, model, prompts, body)]
        labels = [model.id2label[i] for i in sorted(model.id2label)]
        function = activation_of(model)
    else:
        model = service.models.find_for(("causal_lm",), body.model, "classification by `labels`")
        prompts = await read_inputs(service, model, body, body.input, "input")
        labels, function = body.labels or [], "softmax"
        rows = await label_log_likelihoods(service, model, prompts, labels, body.label_template or " {}", body)
    data = []
    for index, row in enumerate(rows):
        probs = activate(row, "none" if body.use_activation is False else function)
        best = max(range(len(row)), key=row.__getitem__)
        data.append({"index": index, "label": labels[best], "probs": probs, "num_classes": len(labels)})
    return list_answer(answer_id, body, model, data, prompts)
