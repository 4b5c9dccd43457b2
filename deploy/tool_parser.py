"""Finds tool calls in a text that grows: Hermes' `<tool_call>` tags, or JSON that a constraint made the model write.

feed("Sure.\\n<tool_")                        -> Content("Sure.")
feed('call>\\n{"name": "add", "arguments": {"a"')  -> CallStart(0, "add"), CallArguments(0, '{"a"')
feed(": 1}}\\n</tool_call>")                  -> CallArguments(0, ": 1}")
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from deploy.tools import ToolUse

_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A further piece of the arguments, which are JSON as text."""

    index: int
    text: str


Piece = Content | CallStart | CallArguments


class Parser:
    """Of a text without tools: all is content."""

    def feed(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        """What was held back; nothing comes after it."""
        return []


def parser_for(use: ToolUse) -> Parser:
    if use.mode == "named":
        assert use.name is not None
        return NamedCall(use.name)
    if use.mode == "required":
        return CallList()
    return HermesCalls(is_parallel=use.is_parallel) if use.mode == "auto" else Parser()


def read_whole(use: ToolUse, text: str) -> tuple[str, list[tuple[str, str]]]:
    """The content of a finished text, and its calls: names and arguments."""
    parser = parser_for(use)
    content, calls = "", list[tuple[str, str]]()
    for piece in [*parser.feed(text), *parser.finish()]:
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallStart):
            calls.append((piece.name, ""))
        else:
            name, arguments = calls[piece.index]
            calls[piece.index] = (name, arguments + piece.text)
    return content, calls


def read_arguments(text: str) -> dict[str, Any] | str:
    """The object that a call's arguments are, also where a model wrote null or an object in a string. What is none, as
    of a call that was cut off, stays text."""
    if text.strip() == "null":
        return {}
    value = _parse(text)
    if isinstance(value, str):
        value = _parse(value)
    return value if isinstance(value, dict) else text


class NamedCall(Parser):
    """The output is the arguments of one known function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Piece]:
        if not text:
            return []
        start: list[Piece] = [] if self._has_begun else [CallStart(0, self._name)]
        self._has_begun = True
        return [*start, CallArguments(0, text)]


class CallScanner:
    """Reads one call, {"name": ..., "arguments": {...}}, char by char; "parameters" is another word for arguments.

    `arguments` grows as an object comes; another value waits for its end, as it may be an object in a string. A text
    that can't be a call makes it broken."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""
        self.is_done = False
        self.is_broken = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._key: str | None = None
        self._raw = ""  # of the key or value being read

    def feed(self, text: str) -> int:
        """Reads until the call ends or breaks; the number of characters read."""
        for i, char in enumerate(text):
            self._read(char)
            if self.is_done or self.is_broken:
                return i + 1
        return len(text)

    def _read(self, char: str) -> None:
        if self._in_string:
            self._take(char)
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            return
        if self._depth == 0:
            self._depth = 1 if char == "{" else 0
            self.is_broken = not (char == "{" or char.isspace())
            return
        if self._depth == 1 and char in ",}":
            self._end_value(is_last=char == "}")
        elif self._depth == 1 and char == ":" and self._key is None:
            key = _parse(self._raw)
            self._raw = ""
            self._key = key if isinstance(key, str) else ""
            self.is_broken = not isinstance(key, str)
        elif not (self._depth == 1 and char.isspace()):
            self._depth += (char in "{[") - (char in "}]")
            self._in_string = char == '"'
            self._take(char)

    def _take(self, char: str) -> None:
        if self._key in _ARGUMENTS and not self._raw and (self.arguments or char == "{"):
            self.arguments += char
        else:
            self._raw += char

    def _end_value(self, *, is_last: bool) -> None:
        if self._key == "name":
            name = _parse(self._raw)
            self.name = name if isinstance(name, str) else None
            self.is_broken = self.name is None
        elif self._key in _ARGUMENTS and self._raw:
            arguments = read_arguments(self._raw)
            self.arguments += arguments if isinstance(arguments, str) else json.dumps(arguments)
        elif self._key is None and (self._raw or not is_last):
            self.is_broken = True
        self._key, self._raw = None, ""
        if is_last:
            self.is_done = self.name is not None
            self.is_broken = self.name is None


class CallList(Parser):
    """The output is a JSON list of calls."""

    def __init__(self) -> None:
        self._index = 0
        self._current = _Call(0)

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if not self._current.raw:
                text = text.lstrip("[], \t\r\n")  # between calls
            read, found = self._current.feed(text)
            pieces += found
            text = text[read:]
            if self._current.scanner.is_done:
                self._index += 1
                self._current = _Call(self._index)
            elif self._current.scanner.is_broken:
                break
        return pieces


class HermesCalls(Parser):
    """Content with `<tool_call>{...}</tool_call>` in it. What claims to be a call and isn't stays content."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, *, is_parallel: bool) -> None:
        self._is_parallel = is_parallel
        self._num_calls = 0
        self._call: _Call | None = None
        self._awaits_close = False
        self._space = ""  # before the tag of the call being read: dropped if it is a call
        self._held = ""  # content that may begin a tag, space that may stand before one, or what comes before CLOSE

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._call is not None:
                text = self._read_call(self._call, text, pieces)
            elif self._awaits_close:
                text = self._read_close(text)
            else:
                text = self._read_content(text, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """Whatever is held back becomes content."""
        is_tag = self._awaits_close and self.CLOSE.startswith(self._held.lstrip())  # cut off
        held = "" if is_tag else self._held
        if self._call is not None:
            held = "" if self._call.has_begun else self._space + self.OPEN + self._call.raw
        self._held = ""
        return [Content(held)] if held.strip() or (held and not self._num_calls) else []

    def _read_content(self, text: str, pieces: list[Piece]) -> str:
        content, tag, rest = (self._held + text).partition(self.OPEN)
        if tag:
            shown, self._held = content.rstrip(), ""
            self._call, self._space = _Call(self._num_calls), content[len(shown) :]
        else:
            tag_start = max(k for k in range(len(self.OPEN)) if content.endswith(self.OPEN[:k]))
            shown = content[: len(content) - tag_start].rstrip()
            self._held = content[len(shown) :]
        if shown:
            pieces.append(Content(shown))
        return rest

    def _read_call(self, call: _Call, text: str, pieces: list[Piece]) -> str:
        num_read, found = call.feed(text)
        if self._is_parallel or call.index == 0:
            pieces += found
        if not (call.scanner.is_done or call.scanner.is_broken):
            return ""
        self._call = None
        if call.has_begun:
            self._num_calls += 1
            self._awaits_close = True
        else:
            pieces.append(Content(self._space + self.OPEN + call.raw))
        return text[num_read:]

    def _read_close(self, text: str) -> str:
        """What comes after CLOSE. Where the next OPEN shows that a model left it out: all that comes after the call."""
        held = (self._held + text).lstrip("}")  # models write a brace too many
        before, tag, rest = held.partition(self.CLOSE)
        is_left_out = self.OPEN in before
        if not tag and not is_left_out:
            self._held = held
            return ""
        self._awaits_close, self._held = False, ""
        return held if is_left_out else rest


class _Call:
    """A call being read, and what of it has been given out."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.scanner = CallScanner()
        self.raw = ""
        self.has_begun = False  # its name is out
        self._num_given = 0

    def feed(self, text: str) -> tuple[int, list[Piece]]:
        """How much was read, and the new pieces. Arguments that came before the name wait for it."""
        num_read = self.scanner.feed(text)
        self.raw += "" if self.has_begun else text[:num_read]
        pieces: list[Piece] = []
        if self.scanner.name is not None:
            if not self.has_begun:
                pieces.append(CallStart(self.index, self.scanner.name))
                self.has_begun = True
            arguments = self.scanner.arguments or ("{}" if self.scanner.is_done else "")
            if new := arguments[self._num_given :]:
                pieces.append(CallArguments(self.index, new))
                self._num_given += len(new)
        return num_read, pieces


def _parse(raw: str) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
