"""What each kind of head is for, and where it is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """`name` is the Hub's; `endpoints` are the paths to POST to, the plainest first."""

    name: str
    endpoints: tuple[str, ...]


_EMBEDDING_PATHS = ("/v1/embeddings", "/pooling", "/score")
TASKS: Mapping[str, Task] = {
    "causal_lm": Task(
        "text-generation",
        (
            *("/v1/chat/completions", "/v1/completions", "/v1/messages"),
            *("/hf/text-generation", "/hf/zero-shot-classification", *_EMBEDDING_PATHS),
        ),
    ),
    "sequence_classification": Task("text-classification", ("/classify", "/pooling", "/hf/text-classification")),
    "token_classification": Task("token-classification", ("/hf/token-classification", "/pooling")),
    "question_answering": Task("question-answering", ("/hf/question-answering",)),
    "base": Task("feature-extraction", _EMBEDDING_PATHS),
}
