from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.chat_template import ChatTemplate
from model.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " Once upon "}]


def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox, naïve 你好 🙂"] * 3, trainer)
    backend.add_tokens(["<tool call>"])
    return Tokenizer(backend, {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}})


def byte_fallback() -> Tokenizer:
    """As sentencepiece models have it: characters, and bytes for the rest."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocab |= {char: 257 + i for i, char in enumerate("abcdefghijklmnopqrstuvwxyz▁")}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend, {})


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40), st.booleans())
def test_pieces_join_to_the_decoded_text_for_any_tokens(token_ids: list[int], skips: bool) -> None:
    detokenizer = BYTE_LEVEL.detokenizer(skip_special_tokens=skips)
    text = "".join(detokenizer.push(token_id) for token_id in token_ids) + detokenizer.finish()
    assert text == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skips)


def bytes_or_text(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Runs of <0xNN> tokens as UTF-8, and the rest as the library decodes it: a reference without a stream."""
    parts = []
    for are_bytes, run in itertools.groupby(token_ids, lambda token_id: 1 <= token_id <= 256):
        ids = list(run)
        parts.append(bytes(i - 1 for i in ids).decode("utf-8", "replace") if are_bytes else tokenizer.decode(ids))
    return "".join(parts)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*range(257, 260), *range(282, 287), *(b + 1 for b in "aé🙂\ufffd".encode()), 0]), max_size=12
    )
)
def test_any_bytes_of_a_byte_fallback_stream(token_ids: list[int]) -> None:
    detokenizer = BYTE_FALLBACK.detokenizer()
    text = "".join(detokenizer.push(token_id) for token_id in token_ids) + detokenizer.finish()
    assert text == bytes_or_text(BYTE_FALLBACK, token_ids)
    if "\ufffd" not in text:
        assert text == BYTE_FALLBACK.decode(token_ids)


def test_a_byte_token_is_its_byte() -> None:
    assert BYTE_FALLBACK.token_bytes(0xE4 + 1) == b"\xe4" and BYTE_FALLBACK.token_text(0xE4 + 1) == "\ufffd"
    assert b"".join(map(BYTE_FALLBACK.token_bytes, BYTE_FALLBACK.encode("a你🙂"))).decode() == "a你🙂"
    assert BYTE_LEVEL.fallback_bytes == {}


def test_a_space_is_dropped_at_the_beginning_only_whatever_comes_first() -> None:
    backend = Backend.from_str(BYTE_FALLBACK.backend.to_str())
    backend.add_tokens(["�"])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = Tokenizer(backend, {})
    space, smile, broken = 283, [byte + 1 for byte in "🙂".encode()], 284
    for token_ids in ([space, 257, space, 258], [*smile, space, 257], [257, broken, *smile, space, broken, broken]):
        detokenizer = tokenizer.detokenizer()
        text = "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()
        assert text == tokenizer.decode(token_ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab 你🙂é"), max_size=20))
def test_a_character_comes_only_when_it_is_whole(tokenizer: Tokenizer, text: str) -> None:
    text = text if tokenizer is BYTE_LEVEL else text.replace(" ", "")
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_token_bytes_join_to_the_text() -> None:
    text = "the naïve 你好 🙂 <tool call>"
    assert b"".join(BYTE_LEVEL.token_bytes(token_id) for token_id in BYTE_LEVEL.encode(text)) == text.encode()
    assert BYTE_LEVEL.token_bytes(10_000) == b""


def test_special_tokens_are_known() -> None:
    assert BYTE_LEVEL.special_ids == {0, 1, 2}


def test_the_tokenizers_own_end_token_is_among_the_end_ids() -> None:
    assert BYTE_LEVEL.end_ids([0]) == (0, 2) and BYTE_LEVEL.end_ids([2, 5]) == (2, 5)
    assert BYTE_FALLBACK.end_ids([7]) == (7,)
    for token in ("<none>", {"content": "<none>"}, 5, None):
        assert Tokenizer(BYTE_LEVEL.backend, {"eos_token": token}).end_ids([]) == ()


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        BYTE_LEVEL.encode("\ud800")


def save(directory: Path, **config: object) -> Path:
    BYTE_LEVEL.backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_tokenizer_must_fit_the_vocabulary(tmp_path: Path) -> None:
    save(tmp_path)
    assert Tokenizer.from_directory(tmp_path, vocab_size=BYTE_LEVEL.max_token_id + 1)
    with pytest.raises(ValueError, match=r"token id \d+ is outside the model's vocab_size = \d+"):
        Tokenizer.from_directory(tmp_path, vocab_size=BYTE_LEVEL.max_token_id)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        Tokenizer.from_directory(tmp_path)


def test_templates_are_found_wherever_they_are(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(save(tmp_path)).chat_template is None

    def shown(**config: object) -> str:
        template = Tokenizer.from_directory(save(tmp_path, **config)).chat_template
        assert template is not None
        return template.render(MESSAGES)

    assert shown(chat_template="A{{ eos_token }}", eos_token="E") == "AE"
    assert shown(chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J{{ messages | length }}")
    assert shown(chat_template="A") == "J2"
    (tmp_path / "other.jinja").write_text("O")
    other = Tokenizer.from_directory(tmp_path, chat_template_file=tmp_path / "other.jinja").chat_template
    assert other is not None and other.render(MESSAGES) == "O"
    with pytest.raises(ValueError, match="chat template"):
        Tokenizer.from_directory(tmp_path, chat_template_file=tmp_path / "none.jinja")


def test_templates_in_files_of_their_own_win_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def check(**expected: str) -> None:
        template = Tokenizer.from_directory(tmp_path).chat_template
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template
        assert template is not None and template.sources == expected
        assert (theirs if isinstance(theirs, dict) else {"default": theirs}) == expected

    save(tmp_path, chat_template=[{"name": "default", "template": "C"}, {"name": "rag", "template": "R"}])
    check(default="C", rag="R")
    (tmp_path / "chat_template.jinja").write_text("J")
    check(default="J")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    check(default="J", tool_use="T")
    (tmp_path / "chat_template.jinja").unlink()
    check(tool_use="T")
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("D")
    (tmp_path / "chat_template.jinja").write_text("J")
    check(default="D", tool_use="T")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


MARKED = (
    "{% set shown = 'no' %}{% for m in messages %}{{ m.role }}: {% generation %}{% set shown = 'yes' %}\n"
    "  {{ m.content }}\n  {% endgeneration %}{{ shown }}\n{% endfor %}"
)


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_a_chat_is_rendered_as_transformers_does(source: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL.backend)
    template = ChatTemplate({"default": source}, {})
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        expected = theirs.apply_chat_template(MESSAGES, chat_template=source, tokenize=False, **options)
        assert template.render(MESSAGES, **options) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["<", "e", "im_end", "end|>", "Once upon ", "  a\n", "twice twice", "\U0001f600"])
@pytest.mark.parametrize("shown", ["m.content", "m.content | trim"])
def test_a_final_message_goes_on_where_transformers_goes_on(content: str, shown: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL.backend)
    source = CHATML.replace("m.content", shown)
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    assert ChatTemplate({"default": source}, {}).render(messages, **options) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "source"), [(" ", CHATML), (None, CHATML), ("x", "{{ messages[0].content }}")], ids=str
)
def test_a_final_message_that_is_not_there_cannot_go_on(content: str | None, source: str) -> None:
    with pytest.raises(ValueError, match="continue_final_message"):
        ChatTemplate({"default": source}, {}).render(
            [*MESSAGES, {"role": "assistant", "content": content}], continue_final_message=True
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10000000 }}",
        "{{ 10000000 * [1] }}",
        "{{ 9 ** 999999 }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r if 0 %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ ('%9000000d' % 1)|length }}",
        "{{ ('%*d' % (9000000, 1))|length }}",
        "{{ ('%.9000000f' % 1)|length }}",
        "{{ raise_exception('no') }}",
        "{{ messages[99].content.nothing }}",
        "{{ 1 / 0 }}",
        "{% include 'x' %}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_templates_can_neither_escape_nor_exhaust(source: str) -> None:
    template = ChatTemplate({"default": source}, {})
    with pytest.raises(ValueError):  # noqa: PT011
        template.render(MESSAGES, max_chars=100_000, timeout_s=1.0)


def test_loops_are_what_they_are_without_a_deadline() -> None:
    source = (
        "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last }} {% endfor %}"
        "{% for i in [] %}{% else %}none{% endfor %}{% for i in range(6)[::-2] if i > 1 recursive %}"
        "{{ i }}{{ loop([9]) if i == 3 }}{{ '%02d|%s' % (i, 'x') }}{% endfor %}{{ 7 % 4 }}"
    )
    assert ChatTemplate({"default": source}, {}).render([]) == Environment().from_string(source).render()


def test_what_a_template_shows_is_known() -> None:
    assert ChatTemplate({"default": "{% if tools %}{{ tools }}{% endif %}"}, {}).takes_tools()
    assert not ChatTemplate({"default": CHATML}, {}).takes_tools()
    with pytest.raises(ValueError, match="chat template 'default'"):
        ChatTemplate({"default": "{% if %}"}, {})
    with pytest.raises(ValueError, match="set by the server"):
        ChatTemplate({"default": CHATML}, {}).render(MESSAGES, variables={"messages": []})
    assert ChatTemplate({"default": "{{ style }}"}, {}).render(MESSAGES, variables={"style": "x"}) == "x"
