"""Where a model's files are: a local directory, or a Hugging Face hub id that is fetched into the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.errors import first_line
from model.config import ModelConfig

HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
]


def locate_model(
    model: str, revision: str | None = None, download_dir: str | None = None, files: Sequence[str] = HUB_FILES
) -> Path:
    """The directory that holds the model's files; fetches from the hub, with its progress bars, what isn't cached.

    Raises ValueError, with what to do, when there is neither such a directory nor such a repository.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ValueError(f"model {model!r} is no directory here and no hub id (owner/name); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=[*files])
        ).resolve()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model {model!r} is no directory here and could not be fetched from the hub: {first_line(error, 200)}. "
            "Give a local directory, or check the name, the network and HF_TOKEN"
        ) from None


def cached_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """As `locate_model`, without the network: None for a hub id of which this node has no weights yet."""
    path = Path(model).expanduser()
    if path.is_absolute() or path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return found if any(found.glob("*.safetensors")) else None  # `plan` fetches a config alone


def load_config(directory: Path, dtype: str | None) -> ModelConfig:
    """The model's config, with another dtype where one is asked for: bfloat16 is that of the activations too."""
    config = ModelConfig.from_directory(directory)
    return config if dtype is None else replace(config, dtype=dtype, bfloat16_activations=dtype == "bfloat16")
