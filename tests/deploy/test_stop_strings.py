from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.stop_strings import StopStrings
from deploy.tool_parser import CallArguments, CallStart, Content, HermesCalls

TEXT = st.text("ab", max_size=30)


@settings(max_examples=300, deadline=None)
@given(TEXT, st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3), st.integers(1, 7))
def test_the_first_stop_string_is_found_however_the_text_is_cut(text: str, stops: list[str], size: int) -> None:
    matcher = StopStrings(stops)
    found, shown = None, ""
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        found = matcher.feed(piece)
        if found:
            break
        seen = text[: start + len(piece)]
        shown = seen[: len(seen) - matcher.num_held]
        # Held back is exactly what may still become a stop string.
        held = max((k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0)
        assert matcher.num_held == held
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert found is None
    else:
        assert found is not None and found.end == min(ends)
        assert text[found.start : found.end] == found.stop
        assert len(shown) <= found.start
        assert not any(stop in text[: found.start] for stop in stops)


CALL = '<tool_call>\n{"name": "f", "arguments": {"s": "}<\\"", "l": [1, {}]}}\n</tool_call>'


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["text ", "<tool", "\n", CALL, "<tool_call> no", "{"]), max_size=6), st.integers(1, 9))
def test_tool_calls_are_the_same_however_the_text_is_cut(parts: list[str], size: int) -> None:
    text = "".join(parts)

    def read(step: int) -> tuple[str, list[list[str]]]:
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

    assert read(size) == read(10**6)
    assert all(call == ["f", '{"s": "}<\\"", "l": [1, {}]}'] for call in read(size)[1])
