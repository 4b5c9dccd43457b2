"""A model as the API sees it: names, tokenizer, limits and sampling defaults. No weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.errors import InvalidRequest, ModelNotFound
from model.config import ModelConfig
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer

# What vLLM takes from generation_config.json.
_SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


_EMBEDDING_PATHS = ("/v1/embeddings", "/pooling", "/score")


@dataclass(frozen=True, slots=True)
class Task:
    """What a kind of head is for. `name` is the Hub's; `endpoints` are the paths to POST to, the plainest first."""

    name: str
    endpoints: tuple[str, ...]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`names[0]` is the one in answers. `sampling_defaults` and `task_parameters` hold where a request says nothing."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    head_kind: str = "causal_lm"
    root: str = ""
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    id2label: Mapping[int, str] = field(default_factory=dict)
    problem_type: str | None = None
    task_parameters: Mapping[str, Any] = field(default_factory=dict)  # of Hugging Face's endpoints

    @classmethod
    def from_directory(
        cls,
        directory: str | Path,
        *,
        names: Sequence[str] = (),
        tokenizer_directory: str | Path | None = None,
        chat_template_file: str | Path | None = None,
        max_model_len: int | None = None,
        use_generation_config: bool = True,
    ) -> ServedModel:
        """Reads config, tokenizer and generation_config.json. Raises ValueError with one line."""
        directory = Path(directory)
        config = ModelConfig.from_directory(directory)
        if max_model_len is not None and max_model_len > config.max_context_len:
            raise ValueError(
                f"model.max_model_len = {max_model_len} exceeds the {config.max_context_len} tokens of {directory}; "
                "lower it, or extend the model's RoPE in config.json"
            )
        tokenizer = Tokenizer.from_directory(
            tokenizer_directory or directory, vocab_size=config.vocab_size, chat_template_file=chat_template_file
        )
        return cls(
            names=tuple(names) or (directory.resolve().name,),
            tokenizer=tokenizer,
            max_model_len=max_model_len or config.max_context_len,
            vocab_size=config.vocab_size,
            eos_token_ids=tokenizer.end_ids(config.eos_token_ids),
            head_kind=config.head_kind,
            root=str(directory),
            sampling_defaults=_read_defaults(directory / "generation_config.json") if use_generation_config else {},
            id2label=config.id2label,
            problem_type=config.problem_type,
            task_parameters=_read_task_parameters(directory / "config.json", TASKS[config.head_kind].name),
        )

    @property
    def task(self) -> Task:
        return TASKS[self.head_kind]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The paths to POST to, the plainest first."""
        scores_pairs = self.head_kind == "sequence_classification" and len(self.id2label) == 1
        return (*self.task.endpoints, "/score") if scores_pairs else self.task.endpoints

    def card(self, name: str) -> dict[str, Any]:
        """The entry in /v1/models."""
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "expertmesh",
            "root": self.root or self.names[0],
            "parent": None,
            "max_model_len": self.max_model_len,
            "task": self.task.name,
            "permission": [],
        }


class ModelList:
    """The served models. The first one answers when a request names none."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        if not models:
            raise ValueError("no model to serve; give at least one")
        self.models = tuple(models)
        self._by_name: dict[str, ServedModel] = {}
        for model in models:
            for name in model.names:
                if name in self._by_name:
                    raise ValueError(
                        f"two models are served as {name!r}; rename one in model.served_names or model.heads"
                    )
                self._by_name[name] = model

    def find(self, name: str | None) -> ServedModel:
        """Raises ModelNotFound with the names there are."""
        if not name:
            return self.models[0]
        if (model := self._by_name.get(name)) is None:
            raise ModelNotFound(
                f"The model {name[:200]!r} does not exist; there are: {', '.join(self._by_name)}", param="model"
            )
        return model

    def find_for(self, head_kinds: Sequence[str], name: str | None, doing: str) -> ServedModel:
        """A model of one of these kinds; the first one when no name is given. `doing` completes "for X".

        Raises ModelNotFound or InvalidRequest, which says where the named model is served."""
        if name:
            model = self.find(name)
            if model.head_kind in head_kinds:
                return model
            raise InvalidRequest(
                f"{model.names[0]!r} is a {model.task.name} model and not for {doing}; "
                f"it is served at POST {', '.join(model.endpoints)}",
                param="model",
                code="wrong_task",
            )
        for model in self.models:
            if model.head_kind in head_kinds:
                return model
        there = ", ".join(f"{model.names[0]!r} ({model.task.name})" for model in self.models)
        raise InvalidRequest(f"no model here is for {doing}; there are: {there}", param="model", code="wrong_task")

    def find_generator(self, name: str | None) -> ServedModel:
        """A model that writes text. Raises ModelNotFound or InvalidRequest."""
        return self.find_for(("causal_lm",), name, "writing text")

    def cards(self) -> list[dict[str, Any]]:
        return [model.card(name) for model in self.models for name in model.names]


def _read_defaults(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        defaults = {name: values[name] for name in _SAMPLING_DEFAULTS if values.get(name) is not None}
        top_k = defaults.get("top_k") or None  # 0 and -1 are "no limit" there
        renamed = {"top_k": None if top_k == -1 else top_k, "max_tokens": defaults.get("max_new_tokens")}
        SamplingParams.from_dict(
            {name: value for name, value in defaults.items() if name != "max_new_tokens"} | renamed
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a generation config ({error}); correct or remove it") from None
    return defaults


def _read_task_parameters(path: Path, task: str) -> dict[str, Any]:
    """What the checkpoint's `task_specific_params` say for its task, in the Hub's names."""
    given = json.loads(path.read_text(encoding="utf-8")).get("task_specific_params") or {}
    parameters = given.get(task) or {} if isinstance(given, dict) else None
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: task_specific_params must map tasks to objects of parameters; correct or remove it")
    return parameters
