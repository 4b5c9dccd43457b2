"""Several models in one settings file: what each mesh is told, and requests that find the routers of their model."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import Unavailable
from deploy.placed_tokens import place_tokens, trim, window_starts
from deploy.router_pool import PoolRequest, RouterPool
from deploy.settings import LimitSettings, MeshSettings, Settings, load
from model.tokenizer import Tokenizer
from tests.deploy.fakes import FakeRouter
from tests.deploy.tiny_heads import write_nfc_tokenizer
from tests.waiting import until

LISTED = """
models:
  - {path: /models/one, heads: {topics: /models/topics}}
  - {path: /models/two, served_names: [second], mesh: {shards: 4}, engine: {quantization: int8}}
  - {path: /models/three, mesh: {name: third}}
mesh: {shards: 2, routers: 2, token: secret}
engine: {block_size: 8}
"""


def write(path: Path, text: str) -> Path:
    file = path / "mesh.yaml"
    file.write_text(text)
    return file


def test_each_model_has_a_mesh_of_its_own_with_what_differs(tmp_path: Path) -> None:
    one, two, three = load(file=write(tmp_path, LISTED)).settings.each_mesh()
    assert [mesh.model.path for mesh in (one, two, three)] == ["/models/one", "/models/two", "/models/three"]
    assert [mesh.mesh.name for mesh in (one, two, three)] == ["default", "default-2", "third"]
    assert [mesh.mesh.shards for mesh in (one, two, three)] == [2, 4, 2]
    assert [mesh.engine.quantization for mesh in (one, two, three)] == [None, "int8", None]
    assert all(mesh.mesh.routers == 2 and mesh.mesh.token == "secret" for mesh in (one, two, three))
    assert one.model.heads == {"topics": "/models/topics"} and two.model.heads == {}
    assert all(mesh.engine.block_size == 8 and not mesh.further_models for mesh in (one, two, three))


def test_one_model_needs_no_list(tmp_path: Path) -> None:
    settings = load(file=write(tmp_path, "model: {path: /models/one}")).settings
    assert settings.each_mesh() == [settings]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {path: a}", "expected a list of models"),
        ("models: []", "expected a list of models"),
        ("models: [{path: a}]\nmodel: {path: b}", "either `model` or the list `models`"),
        ("models: [{path: a, mesh: {shards: 2}}]", "are the first model's"),
        ("models: [{path: a}, {served_names: [b]}]", "further_models"),
        ("models: [{path: a}, {path: b, mesh: {shard: 2}}]", "mesh.shard"),
        ("models: [{path: a}, {path: b, mesh: {name: default}}]", "a name of its own"),
        ("models: [{path: a}, {path: b, mesh: {token: secret}}]", r"models\[1\] \(b\): mesh.token .* top-level `mesh`"),
        ("models: [{path: a}, {path: b, mesh: {router_silence_s: 2}}]", "mesh.router_silence_s"),
    ],
)
def test_a_list_that_cannot_be_served_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        load(file=write(tmp_path, text))
    assert "\n" not in str(refusal.value)


async def ask(pool: RouterPool, model: str) -> Any:
    deadline = asyncio.get_running_loop().time() + 60
    return await pool.pool(PoolRequest(model=model, head="", prompt_ids=[1], deadline=deadline))


def test_a_request_goes_to_the_routers_of_its_model() -> None:
    async def main() -> None:
        routers = [await FakeRouter(router_id=name, models=[name]).start() for name in ("one", "two")]

        async def discover() -> list[dict[str, Any]]:
            return [router.entry for router in routers]

        settings = Settings(mesh=MeshSettings(discover_interval_s=0.05), limits=LimitSettings(router_wait_s=0.3))
        pool = RouterPool(discover, settings)
        await pool.start()
        await until(lambda: len(pool.links) == 2)
        for model, times in (("one", 3), ("two", 2)):
            for _ in range(times):
                await ask(pool, model)
        assert [len(router.requests) for router in routers] == [3, 2]
        assert pool.serves("one") and not pool.serves("three")
        with pytest.raises(Unavailable):
            await ask(pool, "three")
        await pool.close()
        for router in routers:
            router.kill()

    asyncio.run(main())


def test_windows_cover_everything_and_overlap_as_told() -> None:
    assert list(window_starts(10, 4, 1)) == [0, 3, 6] and list(window_starts(3, 4, 1)) == [0]
    for num_tokens in range(1, 30):
        for size in range(1, 8):
            for overlap in range(size):
                starts = window_starts(num_tokens, size, overlap)
                found = [range(start, min(start + size, num_tokens)) for start in starts]
                assert {i for window in found for i in window} == set(range(num_tokens))
                assert all(len(set(one) & set(other)) == overlap for one, other in itertools.pairwise(found))


def test_places_cover_what_normalizing_joined(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    write_nfc_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    for text in (
        "e\u0301",
        "Zoe\u0308 a",
        "\u1112\u1161\u11ab.",
        "a\u0323\u0302b",
        "🙂\u200d🚀 x\u0301",
        "e\u0301 e\u0301",
    ):
        tokens = place_tokens(tokenizer, text)
        assert {i for token in tokens for i in range(token.start, token.end)} == set(range(len(text)))

    marks, letters = (
        "\u0301\u0308\u0323\u093c\u05bc\u3099\u0344\u200d\ufe0f",
        "ao ,\nk\u1112\u1161\u11ab\u0915\u0958\ufb2aか韓🙂👩🚀🏽ﬁẛ",
    )
    odd = st.text(marks + letters, min_size=1)

    @settings(max_examples=150, deadline=None)
    @given(st.one_of(odd, st.text(st.characters(exclude_categories=["Cs"]), min_size=1)))
    def check(text: str) -> None:
        tokens = place_tokens(tokenizer, text)
        assert {i for token in tokens for i in range(token.start, token.end)} == set(range(len(text)))
        assert all(one.start < one.end and one.start <= other.start for one, other in itertools.pairwise(tokens))

    check()
    first, *_ = place_tokens(tokenizer, "e\u0301 x")
    assert (first.start, first.end) == (0, 2)
    pair = place_tokens(tokenizer, "ab", "e\u0301")
    assert [token.text_idx for token in pair] == [0, 0, None, 1, 1] and pair[-1].end == 2
    assert trim("a  b ", 1, 5) == (3, 4) and trim("  ", 0, 2) == (0, 2)
