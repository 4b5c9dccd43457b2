from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.stop_strings import StopStrings
from deploy.tool_parser import CallArguments, CallStart, Content, HermesCalls

TEXT = st.text("ab", max_size=30)


@settings(max_examples=500, deadline=None)
@given(
    *(TEXT, TEXT, st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3), st.integers(1, 7)),
)
def test_the_first_stop_string_that_ends_late_enough_is_found_however_the_text_is_cut(
    before: str, after: str, stops: list[str], size: int
) -> None:
    matcher = StopStrings(stops)
    found, shown, seen = None, "", ""
    for text, search in ((before, False), (after, True)):
        for start in range(0, len(text), size):
            piece = text[start : start + size]
            found = matcher.feed(piece, search=search)
            seen += piece
            if found:
                break
            shown = seen[: len(seen) - matcher.num_held]
            # Held back is exactly what may still become a stop string.
            held = max((k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0)
            assert matcher.num_held == held
    text = before + after
    matches = [
        (end, stop) for end in range(len(before) + 1, len(text) + 1) for stop in stops if text[:end].endswith(stop)
    ]
    if not matches:
        assert found is None
    else:
        end = matches[0][0]
        assert found is not None and found.end == end
        assert found.stop == max((stop for at, stop in matches if at == end), key=len)
        assert text[found.start : found.end] == found.stop
        assert len(shown) <= found.start


WRITTEN = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
CALL = WRITTEN % '{"s": "}<\\"", "l": [1, {}]}'
UNCLOSED = CALL.removesuffix("</tool_call>")
ODD_ARGUMENTS = {  # as a model writes them -> as they are given out
    "null": "{}",
    r'"{\"a\": \"}\"}"': '{"a": "}"}',
    '"x, y"': '"x, y"',
    "[1, {}]": "[1, {}]",
    "7": "7",
}


def read_in_steps(text: str, step: int) -> tuple[str, list[list[str]]]:
    """Content and calls of a text that comes `step` characters at a time."""
    parser = HermesCalls(is_parallel=True)
    content, calls = "", []
    pieces = [piece for i in range(0, len(text), step) for piece in parser.feed(text[i : i + step])]
    for piece in [*pieces, *parser.finish()]:
        match piece:
            case Content(added):
                content += added
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, added):
                calls[index][1] += added
    return content, calls


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["text ", "<tool", "\n", CALL, "<tool_call> no", "{", UNCLOSED]), max_size=6),
    st.integers(1, 9),
)
def test_tool_calls_are_the_same_however_the_text_is_cut(parts: list[str], size: int) -> None:
    text = "".join(parts)
    found = read_in_steps(text, size)
    assert found == read_in_steps(text, 10**6)
    assert all(call == ["f", '{"s": "}<\\"", "l": [1, {}]}'] for call in found[1])


@pytest.mark.parametrize(("written", "given_out"), ODD_ARGUMENTS.items())
def test_arguments_are_an_object_where_the_model_meant_one(written: str, given_out: str) -> None:
    for step in (1, 2, 3, 7, 10**6):
        assert read_in_steps(WRITTEN % written, step) == ("", [["f", given_out]])


ONE, TWO = (f'<tool_call>{{"name": "f", "arguments": {{"a": {a}}}}}' for a in (1, 2))
CALLED = [["f", '{"a": 1}'], ["f", '{"a": 2}']]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{ONE}\n{TWO}</tool_call>", "", CALLED),
        (f"{ONE}\nand {TWO}</tool_call>!", "\nand!", CALLED),
        (f"{ONE}}}\n</tool_call>\n{TWO}}}", "", CALLED),
        (f"{ONE}\nDone.", "\nDone.", CALLED[:1]),
        (f"{ONE}\n</tool_", "", CALLED[:1]),
    ],
)
def test_a_call_may_lack_its_closing_tag(text: str, content: str, calls: list[list[str]]) -> None:
    for step in (1, 2, 3, 7, 10**6):
        assert read_in_steps(text, step) == (content, calls)
