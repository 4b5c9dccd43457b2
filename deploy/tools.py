"""Tools of a chat: what a request offers, what it demands, and the constraint that a demand puts on the output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deploy.errors import InvalidRequest, invalid
from model.sampling_params import StructuredSpec

PREAMBLE = """# Tools
To call a function write <tool_call>{{"name": ..., "arguments": {{...}}}}</tool_call>. Functions:
{signatures}"""

WHITESPACE = r"[ \t\n\r]{1,40}"  # between JSON's parts: a small model may never stop writing it


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools that the model may see, and how it must use them. `name` is set when one function is demanded."""

    tools: tuple[Mapping[str, Any], ...] = ()
    mode: Literal["none", "auto", "required", "named"] = "none"
    name: str | None = None
    is_parallel: bool = True

    def structured(self, *, tags_are_tokens: bool = False) -> StructuredSpec | None:
        """What the output must be: for a named function its arguments, for `required` a list of calls, and where the
        model may choose, any text, but calls of strict functions with arguments as their schemas say.

        tags_are_tokens: the vocabulary has tokens of their own for <tool_call> and </tool_call>."""
        if self.mode == "named":
            schema: Any = next(_parameters(tool) for tool in self.tools if _name(tool) == self.name)
        elif self.mode == "required":
            schema = _calls_schema(self.tools, is_parallel=self.is_parallel)
        elif any(tool["function"].get("strict") for tool in self.tools):
            return StructuredSpec("grammar", self._text_with_calls('"' * (not tags_are_tokens)))
        else:
            return None
        return StructuredSpec("json_schema", json.dumps(schema, ensure_ascii=False))

    def _text_with_calls(self, quote: str) -> str:
        """A grammar for llguidance: text until a tag begins a call, the call, text again. Tokens stand unquoted."""
        rules = []
        for i, tool in enumerate(self.tools):
            begin = json.dumps(f'\n{{"name": {json.dumps(_name(tool))}, "arguments": ')
            parameters = _parameters(tool) if tool["function"].get("strict") else {"type": "object"}
            schema = json.dumps({**parameters, "x-guidance": {"whitespace_pattern": WHITESPACE}}, ensure_ascii=False)
            rules.append(f'call_{i}: open {begin} %json {schema} "}}\\n" {quote}</tool_call>{quote}')
        calls = " | ".join(f"call_{i}" for i in range(len(self.tools)))
        tag = f"open{'[lazy]' if quote else ''}: TEXT {quote}<tool_call>{quote}"
        return "\n".join([f"start: ({calls})* text", "text: TEXT", "TEXT: /(.|\\n)*/", tag, *rules])

    def preamble(self) -> str:
        """The tools as text, for chat templates that don't show them; calls look as Hermes and Qwen write them."""
        return PREAMBLE.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.tools))


def read_tool_use(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None, *, is_parallel: bool
) -> ToolUse:
    """Checks both fields. Raises InvalidRequest."""
    checked = tuple(_checked(tool, f"tools[{i}]") for i, tool in enumerate(tools or ()))
    names = [_name(tool) for tool in checked]
    if len(set(names)) < len(names):
        raise invalid("tools", "two functions have the same name; rename one")
    if tool_choice is None or tool_choice == "auto":
        return ToolUse(tools=checked, mode="auto" if checked else "none", is_parallel=is_parallel)
    if tool_choice == "none":
        return ToolUse()
    if not checked:
        raise invalid("tool_choice", "there are no tools to choose from; send tools")
    if tool_choice == "required":
        return ToolUse(tools=checked, mode="required", is_parallel=is_parallel)
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function":
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in names:
            raise invalid("tool_choice", f"no function {str(name)[:80]!r} among tools")
        return ToolUse(tools=checked, mode="named", name=name, is_parallel=False)
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "allowed_tools":
        return _allowed(checked, tool_choice.get("allowed_tools"), is_parallel=is_parallel)
    raise invalid(
        "tool_choice",
        'use "none", "auto", "required", {"type": "function", "function": {"name": ...}} or allowed_tools',
    )


def _allowed(tools: Sequence[Mapping[str, Any]], given: Any, *, is_parallel: bool) -> ToolUse:
    try:
        wanted = {one["function"]["name"] for one in given["tools"]}
        mode = given["mode"]
    except (KeyError, TypeError):
        wanted, mode = set(), None
    kept = tuple(tool for tool in tools if _name(tool) in wanted)
    if mode not in ("auto", "required") or not kept or len(kept) < len(wanted):
        raise InvalidRequest("tool_choice.allowed_tools: a mode and names from tools are required", param="tool_choice")
    return ToolUse(tools=kept, mode=mode, is_parallel=is_parallel)


def _checked(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if tool.get("type", "function") != "function":
        raise InvalidRequest(f"{where}.type: {str(tool['type'])[:80]!r} is not supported; use function", param=where)
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where}.function: an object with a name is required", param=where)
    if not 1 <= len(function["name"]) <= 128:
        raise InvalidRequest(f"{where}.function.name: 1 to 128 characters are required", param=where)
    if not isinstance(function.get("strict"), bool | None):
        raise InvalidRequest(f"{where}.function.strict: true or false is required", param=where)
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise InvalidRequest(f"{where}.function.parameters: a JSON schema object is required", param=where)
    return tool


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    return dict(tool["function"].get("parameters") or {"type": "object", "properties": {}})


def _calls_schema(tools: Sequence[Mapping[str, Any]], *, is_parallel: bool) -> dict[str, Any]:
    """A list of {"name", "parameters"}, as vLLM has it. Definitions move to the top, where references look for them."""
    shared: dict[str, dict[str, Any]] = {}
    calls = []
    for tool in tools:
        parameters = _parameters(tool)
        for group in ("$defs", "definitions"):
            definitions = parameters.pop(group, None) or {}
            if not isinstance(definitions, Mapping):
                raise invalid("tools", f"{group} in a function's parameters: an object of schemas is required")
            for name, definition in definitions.items():
                if shared.setdefault(group, {}).setdefault(name, definition) != definition:
                    raise invalid("tools", f"two different definitions are called {name!r}; rename one")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [_name(tool)]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    return {
        "type": "array",
        "minItems": 1,
        **({} if is_parallel else {"maxItems": 1}),
        "items": {"anyOf": calls},
        **shared,
    }
