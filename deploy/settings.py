"""Settings of a whole service: YAML file < environment `EXPERTMESH_*` < flags. Every value knows where it came from.

    sources = load(file="mesh.yaml", environ=os.environ, flags={"server.port": 9000})
    sources.settings.server.port        # 9000
    sources.explain()                   # [("server.port", 9000, "flag"), ...]

Environment names are the dotted path in capitals with two underscores between the parts: `EXPERTMESH_SERVER__PORT`.
`Settings` is frozen and JSON-able (`model_dump(mode="json")`, `Settings.model_validate`), so it travels to Ray actors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from actors.logs import LogFormat
from actors.specs import TwoBatchOverlap

ENV_PREFIX = "EXPERTMESH_"
SECRETS = frozenset({"server.api_keys", "mesh.token"})
# An ingress greets and watches the routers of all meshes alike.
OF_ALL_MESHES = frozenset({"token", "connect_timeout_s", "discover_interval_s", "router_silence_s"})


class Section(BaseModel):
    """A group of settings: frozen, with no room for unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelSettings(Section):
    """What is served."""

    path: str = "demo"  # directory of the checkpoint, a Hub id, or "demo" for the model in the package
    revision: str | None = None  # of a Hub id
    download_dir: str | None = None  # where Hub files go; None: the Hub's own cache
    served_names: tuple[str, ...] = ()  # names in the API; empty: the last part of the path
    heads: dict[str, str] = {}  # further checkpoints on the same backbone: served name -> directory
    tokenizer: str | None = None  # directory of another tokenizer
    chat_template: str | None = None  # file with another chat template
    generation_config: Literal["auto", "none"] = "auto"  # sampling defaults from generation_config.json
    max_model_len: int | None = Field(default=None, ge=1)  # tokens of prompt and output; None: all that fit


class ServerSettings(Section):
    """Where and for whom the HTTP API is."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_keys: tuple[str, ...] = ()  # empty, and no api_key_file: no authentication
    api_key_file: str | None = None  # further keys, one a line; "#" begins a comment
    allowed_origins: tuple[str, ...] = ()  # browsers' origins that may call (CORS)
    num_ingresses: int = Field(default=1, ge=1)
    ingress_cpus: float = Field(default=0.0, ge=0)
    ingress_resources: dict[str, float] = {}  # custom Ray resources that each ingress asks for
    allow_open_ray: bool = False  # start also where Ray asks nobody for a token
    log_format: LogFormat = "text"  # json: one object a line, from every part
    otlp_traces_endpoint: str | None = Field(default=None, pattern=r"^https?://")  # whole URL; None: no traces

    @field_validator("api_keys")
    @classmethod
    def _no_empty_key(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(not key or not key.isascii() or key != key.strip() for key in keys):
            raise ValueError("an API key must be non-empty ASCII without spaces around it; remove or change it")
        return keys


class LimitSettings(Section):
    """What one client or one request may ask for."""

    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    max_queue: int = Field(default=1024, ge=1)  # requests that one ingress holds at once; more are answered with 503
    max_requests_per_key: int | None = Field(default=None, ge=1)  # at once, over all ingresses; more get 429
    requests_per_minute_per_key: int | None = Field(default=None, ge=1)  # likewise
    max_n: int = Field(default=128, ge=1)  # choices per prompt
    max_prompts: int = Field(default=1024, ge=1)  # prompts per completion request, each counted n times
    max_logprobs: int = Field(default=20, ge=0)
    max_stop_strings: int = Field(default=64, ge=0)
    request_timeout_s: float = Field(default=600.0, gt=0)  # for the body to come, and then to the last token
    router_wait_s: float = Field(default=60.0, ge=0)  # how long a request waits for a router when there is none
    template_timeout_s: float = Field(default=5.0, gt=0)
    max_template_chars: int = Field(default=16 << 20, ge=1)  # size of a rendered chat


class EngineSettings(Section):
    """What each router runs with."""

    # Wider weights are rounded to it while loading; auto: to that of config.json. bfloat16 also rounds activations
    # where they meet a weight, as other servers do: faster on a CPU with AMX or AVX-512 for bf16. Otherwise they stay
    # float32.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["int8", "int4"] | None = None
    kv_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where dtype says so, else float32
    # Tokens in a KV block. The native attention kernel needs a multiple of 16 (and such a head_dim, up to 256); others
    # run in plain torch, slower and without the promise of the same bits for any chunking of a prompt.
    block_size: int = Field(default=16, ge=1)
    num_kv_blocks: int | None = Field(default=None, ge=2)  # one stays empty; None: as many as kv_cache_bytes holds
    kv_cache_bytes: ByteSize = Field(default=ByteSize(4 << 30), ge=1)  # of a router: at most; a number, or "16GiB"
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    max_waiting: int = Field(default=512, ge=1)  # requests in a router's queue; more are answered with queue_full
    prefix_cache: bool = True
    threads: int | None = Field(default=None, ge=1)  # of a router; None: its part of what shards leave, of two at least
    seed: int | None = Field(default=None, ge=0, lt=2**63)  # of requests without one; None: another for each


class MeshSettings(Section):
    """How many of each part there are and how they talk."""

    shards: int = Field(default=2, ge=1)
    routers: int = Field(default=1, ge=1)
    replicas: int = Field(default=1, ge=1)  # copies of each expert
    transport: Literal["auto", "star", "all_to_all", "host"] = "auto"
    # Steps in two micro-batches, one with the router while the other is with the shards. auto: where measured faster.
    two_batch_overlap: TwoBatchOverlap = "auto"
    name: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")  # part of the actors' names
    local: bool = False  # no shards: each router holds all experts itself, on its own device
    spares: int = Field(default=0, ge=0)  # further shards that run empty, ready to take over
    spread: Literal["pack", "strict"] = "pack"  # strict: each shard on a node of its own
    shard_cpus: float = Field(default=1.0, ge=0)
    shard_gpus: float = Field(default=0.0, ge=0)
    shard_resources: dict[str, float] = {}  # custom Ray resources that each shard asks for
    router_cpus: float = Field(default=1.0, ge=0)
    router_gpus: float = Field(default=0.0, ge=0)
    router_resources: dict[str, float] = {}  # custom Ray resources that each router asks for
    token: str | None = None  # shared secret of the links; None: a random one at start
    connect_timeout_s: float = Field(default=5.0, gt=0)
    step_timeout_s: float = Field(default=30.0, gt=0)  # upper bound; the deadline of a step adapts below it
    discover_interval_s: float = Field(default=1.0, gt=0)
    router_silence_s: float = Field(default=10.0, gt=0)  # a router silent for so long is left; it reports each 0.5 s
    recovery_timeout_s: float = Field(default=120.0, gt=0)
    rebalance: bool = True  # hot experts are copied and moved by measured load
    rebalance_objective: Literal["tokens", "activated"] = "tokens"  # activated: for decodes bound by memory
    rebalance_interval_s: float = Field(default=30.0, gt=0)
    rebalance_window_s: float = Field(default=120.0, gt=0)  # loads of so long count
    redundant_slots: int = Field(default=0, ge=0)  # experts that a shard may hold beyond its even share
    autoscale: bool = False  # shards come and go by how busy they are
    min_shards: int = Field(default=1, ge=1)
    max_shards: int = Field(default=8, ge=1)
    autoscale_cooldown_s: float = Field(default=60.0, ge=0)


class FurtherModel(ModelSettings):
    """A model with a backbone of its own, and so with a mesh of its own.

    `engine` and `mesh` hold what differs from the sections of the same name; nothing of OF_ALL_MESHES can."""

    path: str
    engine: dict[str, Any] = {}
    mesh: dict[str, Any] = {}


class Settings(Section):
    """Everything. Sections are values; change one with `settings.model_copy(update={...})`."""

    model: ModelSettings = ModelSettings()
    server: ServerSettings = ServerSettings()
    limits: LimitSettings = LimitSettings()
    engine: EngineSettings = EngineSettings()
    mesh: MeshSettings = MeshSettings()
    further_models: tuple[FurtherModel, ...] = ()  # in a file: the list `models`, after its first entry

    def each_mesh(self) -> list[Settings]:
        """The settings of each mesh by itself: of the main model, and of those with backbones of their own.

        Raises ValueError for a mesh or engine that can't be, or a name that two meshes have."""
        found = [self.model_copy(update={"further_models": ()})]
        for number, further in enumerate(self.further_models, 2):
            where = f"models[{number - 1}] ({further.path})"
            if taken := sorted(OF_ALL_MESHES & further.mesh.keys()):
                raise ValueError(f"{where}: mesh.{taken[0]} holds for all meshes; set it in the top-level `mesh`")
            model = further.model_dump(exclude={"engine", "mesh"})
            engine = self.engine.model_dump() | further.engine
            mesh = self.mesh.model_dump() | {"name": f"{self.mesh.name}-{number}"} | further.mesh
            shared = {"server": self.server.model_dump(), "limits": self.limits.model_dump()}
            try:
                found.append(Settings.model_validate({"model": model, "engine": engine, "mesh": mesh, **shared}))
            except ValidationError as error:
                first = error.errors()[0]
                name = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"{where}: {name}: {first['msg']}") from None
        names = [one.mesh.name for one in found]
        if len(set(names)) < len(names):
            raise ValueError(f"mesh.name: each model's mesh needs a name of its own, got {', '.join(names)}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSettings:
    """Settings and, for each dotted name, the source of its value."""

    settings: Settings
    origins: Mapping[str, str]

    def explain(self) -> list[tuple[str, Any, str]]:
        """(name, value, source) of every setting, for `--print-config`. Keys are masked."""
        rows = []
        for name in field_names():
            section, field = name.split(".")
            value = getattr(getattr(self.settings, section), field)
            shown = "********" if name in SECRETS and value else value
            rows.append((name, shown, self.origins.get(name, "default")))
        for number, further in enumerate(self.settings.further_models, 1):
            rows.append((f"models[{number}]", further.model_dump(exclude_unset=True), self.origins["models"]))
        return rows


def field_names() -> list[str]:
    """All settings as dotted names, in the order of the classes above."""
    return [f"{section}.{field}" for section, model in _sections().items() for field in model.model_fields]


def load(
    *,
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> LoadedSettings:
    """Merges the three sources and validates. Flags are dotted names, or sections as in a file; None is unset.

    Raises ValueError with one line: name, value, rule, source."""
    values: dict[str, Any] = {section: {} for section in _sections()}
    origins: dict[str, str] = {}

    def put(name: str, value: Any, source: str) -> None:
        section, field = name.split(".")
        values[section][field] = value
        origins[name] = source

    def put_all(data: dict[str, Any], source: str) -> None:
        if (further := _take_models(data, source)) is not None:
            values["further_models"], origins["models"] = further, source
        for name, value in _flatten(data, source):
            if value is not None or source != "flag":
                put(name, value, source)

    if file is not None:
        put_all(_read_yaml(file), f"file {file}")
    for variable, text in (environ or {}).items():
        if not variable.startswith(ENV_PREFIX):
            continue
        if "__" not in variable:
            _check_other_variable(variable, text)
        else:
            name = variable[len(ENV_PREFIX) :].lower().replace("__", ".", 1)
            _check_name(name, f"environment {variable}")
            put(name, _from_text(name, text), f"environment {variable}")
    put_all(dict(flags or {}), "flag")
    try:
        settings = Settings.model_validate(values)
        settings.each_mesh()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:2])
        shown = "********" if name in SECRETS else repr(first.get("input"))
        raise ValueError(f"setting {name} = {shown} ({origins.get(name, 'default')}): {first['msg']}") from None
    for name in ("mesh.shards", "mesh.replicas", "mesh.spares", "mesh.autoscale", "mesh.two_batch_overlap"):
        if settings.mesh.local and name in origins:
            raise ValueError(f"setting {name} ({origins[name]}): mesh.local leaves no shards; remove one of the two")
    return LoadedSettings(settings=settings, origins=origins)


def _sections() -> dict[str, type[Section]]:
    return {
        name: field.annotation
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_name(name: str, source: str) -> None:
    if name not in (known := field_names()):
        raise ValueError(f"unknown setting {name!r} ({source}){nearest(name, known)}")


def _check_other_variable(variable: str, text: str) -> None:
    """Clients and tests have variables of their own, but a setting without its section is a slip."""
    if text.startswith("tcp://"):
        return  # Kubernetes sets EXPERTMESH_PORT for a Service of that name
    for name in field_names():
        known = ENV_PREFIX + name.replace(".", "__").upper()
        if variable in (known.replace("__", "_"), ENV_PREFIX + name.partition(".")[2].upper()):
            raise ValueError(f"environment {variable} is no setting; did you mean {known}?")


def _read_yaml(file: str | Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"settings file {file}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        known = ", ".join(_sections())
        raise ValueError(f"settings file {file}: expected sections ({known}), found {type(data).__name__}")
    return data


def _take_models(data: dict[str, Any], source: str) -> list[Any] | None:
    """Takes the list `models` out: its first entry becomes the section `model`, the others are returned."""
    models = data.pop("models", None)
    if models is None:
        return None
    if not isinstance(models, list) or not models or not all(isinstance(one, dict) for one in models):
        raise ValueError(f"models ({source}): expected a list of models, each with its path")
    if "model" in data:
        raise ValueError(f"model ({source}): a file has either `model` or the list `models`; remove one")
    if set(models[0]) & {"engine", "mesh"}:
        raise ValueError(f"models[0] ({source}): the sections `engine` and `mesh` are the first model's; put it there")
    data["model"] = models[0]
    return models[1:]


def _flatten(data: Mapping[str, Any], source: str) -> Iterable[tuple[str, Any]]:
    """Dotted names of all that is there, each a known one."""
    sections = _sections()
    for section, fields in data.items():
        if "." in str(section):
            _check_name(section, source)
            yield section, fields
            continue
        if section not in sections:
            raise ValueError(f"unknown section {section!r} ({source}){nearest(str(section), sections)}")
        if not isinstance(fields, Mapping):
            raise ValueError(f"section {section!r} ({source}): expected settings, found {type(fields).__name__}")
        yield from _flatten({f"{section}.{field}": value for field, value in fields.items()}, source)


def _from_text(name: str, text: str) -> Any:
    """Environment text to a value: lists are YAML or comma-separated, dicts are YAML, the rest pydantic reads."""
    section, field = name.split(".")
    annotation = _sections()[section].model_fields[field].annotation
    if type(None) in get_args(annotation) and text.strip().lower() in ("", "none", "null"):
        return None
    if get_origin(annotation) is tuple and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(annotation) in (tuple, dict):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text
