"""Chat templates: Jinja from the checkpoint, in a sandbox, with caps on what it may produce.

Templates come with the checkpoint, messages from clients; messages are only ever data. Even so a template could be made
to work hard, so: loops over `range` end at 100,000 (Jinja's own cap), `*`, `**` and `%` can't build giants, the output
is counted as it grows against a number of characters, and each turn of a loop, each call and each piece of output looks
at a deadline. What a single filter, method or `~` does isn't bounded: a checkpoint's author who means harm could still
have `center` or `format` fill the memory.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_FACTOR = 100_000
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(\*|\d{6})")  # a width of the arguments', or above 99,999
_CHECK_DEADLINE = "check deadline"  # in a template's context; with a space, so that templates can't name it
GOES_ON = "EXPERTMESH_GOES_ON_HERE "  # its space tells whether a template strips
RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now", "bos_token", "eos_token"}
)


class ChatTemplate:
    """A checkpoint's templates by name ("default", maybe "tool_use"). `render` raises ValueError for any failure."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources = dict(templates)
        self._special_tokens = dict(special_tokens)
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _tojson
        environment.filters["until_deadline"] = _until_deadline
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._templates: dict[str, jinja2.Template] = {}
        self._variables: dict[str, set[str]] = {}
        for name, source in templates.items():
            try:
                tree = environment.parse(source)
                self._variables[name] = jinja2.meta.find_undeclared_variables(tree)
                # As if the template had `for x in xs | until_deadline` wherever it has a loop.
                for loop in list(tree.find_all(jinja2.nodes.For)):
                    loop.iter = jinja2.nodes.Filter(
                        *(loop.iter, "until_deadline", [], [], None, None),
                        lineno=loop.lineno,
                        environment=environment,
                    )
                self._templates[name] = environment.from_string(tree)
            except jinja2.TemplateError as error:
                raise ValueError(f"chat template {name!r}: {error}") from None

    def takes_tools(self) -> bool:
        """Whether a template shows the model its tools."""
        return "tool_use" in self._templates or any("tools" in names for names in self._variables.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        max_chars: int = 16 << 20,
        timeout_s: float = 5.0,
    ) -> str:
        """The prompt. With `continue_final_message` it ends with the last message's content, to go on there."""
        if taken := RESERVED & (variables or {}).keys():
            raise ValueError(f"chat_template_kwargs: {min(taken)!r} is set by the server; remove it")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name) or next(iter(self._templates.values()))
        deadline = time.monotonic() + timeout_s

        def check_deadline() -> None:
            if time.monotonic() > deadline:
                raise ValueError(f"the chat template took longer than {timeout_s:g} s; send fewer or shorter messages")

        context = {
            **self._special_tokens,
            **(variables or {}),
            "messages": _marked(messages) if continue_final_message else messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
            _CHECK_DEADLINE: check_deadline,
        }
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in template.generate(context):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > max_chars:
                    raise ValueError(
                        f"the rendered chat is longer than {max_chars} characters; send fewer or shorter messages"
                    )
                check_deadline()
        except ValueError:
            raise
        except Exception as error:  # templates may raise whatever Python raises
            raise ValueError(f"chat template: {' '.join(str(error).split())[:300] or type(error).__name__}") from None
        text = "".join(pieces)
        return _cut_at_mark(text) if continue_final_message else text


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: for training it marks what the assistant says. Here that is shown."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line_number = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), True), lineno=line_number)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def call(self, context: jinja2.runtime.Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        context.parent[_CHECK_DEADLINE]()
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sized = next((one for one in (left, right) if isinstance(one, str | list | tuple)), None)
            is_large = sized is not None and len(sized) * abs(right if sized is left else left) > MAX_FACTOR
        else:
            is_large = operator == "**" or (isinstance(left, str) and _WIDE_FORMAT.search(left) is not None)
        if is_large:
            raise ValueError(f"chat template: {operator!r} with operands this large is not allowed")
        return super().call_binop(context, operator, left, right)


def find_templates(directory: Path, config: Mapping[str, Any], file: str | Path | None = None) -> dict[str, str]:
    """Templates by name: from `file`, else chat_template.jinja ("default") and additional_chat_templates/NAME.jinja,
    else chat_template.json, else tokenizer_config.json."""
    default = Path(file) if file is not None else directory / "chat_template.jinja"
    files = {"default": default} if file is not None or default.is_file() else {}
    if file is None:
        files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if files:
        return {name: _read_template(path) for name, path in files.items()}
    found = config.get("chat_template")
    if found is None and (path := directory / "chat_template.json").is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"chat template {path}: {error}") from None
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        try:
            return {str(one["name"]): str(one["template"]) for one in found}
        except (KeyError, TypeError):
            raise ValueError("tokenizer_config.json: chat_template is a list without names and templates") from None
    return {}


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template {path}: {error}") from None


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with GOES_ON after the final one's text."""
    content = messages[-1].get("content")
    if not (isinstance(content, str) and content.strip()):
        raise ValueError("continue_final_message: the final message has no text to go on from")
    return [*messages[:-1], {**messages[-1], "content": content + GOES_ON}]


def _cut_at_mark(text: str) -> str:
    """Drops the mark and what a template puts after it: the end-of-turn marker."""
    before, mark, after = text.rpartition(GOES_ON.strip())
    if not mark:
        raise ValueError("continue_final_message: the chat template doesn't show the final message")
    return before if after.startswith(" ") else before.rstrip()  # a template that strips strips what is before, too


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As in transformers: without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@jinja2.pass_context
def _until_deadline(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        context.parent[_CHECK_DEADLINE]()
        yield item


def _raise_exception(message: str) -> None:
    raise ValueError(f"chat template: {str(message)[:300]}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
