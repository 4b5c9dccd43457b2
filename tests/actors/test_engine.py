"""The engine with all experts in its process, against transformers and against itself."""

from __future__ import annotations

import threading

import pytest
import torch

from actors.blocks import BlockManager, BlockPool
from actors.engine import ROW_CHARS_AT_ONCE
from actors.request import GenerateRequest, PoolRequest
from actors.scheduler import Scheduler
from actors.sequence import Sequence
from actors.specs import SchedulerLimits
from model.sampling_params import SamplingParams
from tests.actors.conftest import ask, between_steps
from tests.tiny import load_oracle, oracle_greedy, prompt_of, write_tiny_model
from tests.waiting import wait_until


def test_greedy_tokens_equal_transformers_over_64_steps(start_router, tiny_model):
    router, outputs = start_router()
    oracle = load_oracle(tiny_model)
    for seed, length in [(0, 1), (1, 17), (2, 90)]:
        prompt = prompt_of(seed, length)
        ask(router.engine, f"r{seed}", prompt, 64)
        assert outputs.tokens(f"r{seed}") == oracle_greedy(oracle, prompt, 64)


def test_32_streams_at_once_each_equal_their_answer_alone(start_router):
    router, outputs = start_router()
    prompts = [prompt_of(i, 3 + 7 * (i % 6)) for i in range(32)]
    options = [{} if i % 2 else {"temperature": 0.9, "seed": i, "top_p": 0.95} for i in range(32)]
    alone = []
    for i, prompt in enumerate(prompts):
        ask(router.engine, f"alone-{i}", prompt, 24, **options[i])
        alone.append(outputs.tokens(f"alone-{i}"))
    for i, prompt in enumerate(prompts):
        ask(router.engine, f"together-{i}", prompt, 24, **options[i])
    assert [outputs.tokens(f"together-{i}") for i in range(32)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 16


def test_preempted_requests_give_the_same_tokens_and_the_pool_never_grows(start_router):
    router, outputs = start_router(num_kv_blocks=33, limits=SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=64))
    reference, expected = start_router()
    for i in range(12):
        ask(router.engine, f"r{i}", prompt_of(i, 60), 40, temperature=0.7, seed=i)
        ask(reference.engine, f"r{i}", prompt_of(i, 60), 40, temperature=0.7, seed=i)
    for i in range(12):
        assert outputs.tokens(f"r{i}") == expected.tokens(f"r{i}")
    assert router.engine.scheduler.num_preemptions > 0
    wait_until(lambda: not router.engine.scheduler.has_work)
    pools = router.engine.scheduler.blocks.pools
    assert [pool.num_used for pool in pools] == [0, 0]
    assert pools[0].num_blocks == 33
    router.engine.scheduler.check_integrity()


def test_a_shared_prefix_is_computed_once_and_changes_nothing(start_router):
    router, outputs = start_router()
    prefix = prompt_of(5, 100)
    ask(router.engine, "first", [*prefix, 7, 8], 10)
    first = outputs.tokens("first")
    ask(router.engine, "again", [*prefix, 7, 8], 10)
    assert outputs.tokens("again") == first
    assert outputs.chunks["first"][0].num_cached_tokens == 0
    assert outputs.chunks["again"][0].num_cached_tokens == 96
    ask(router.engine, "other", [*prefix, 9, 9, 9], 10)
    plain, expected = start_router(prefix_caching=False)
    ask(plain.engine, "other", [*prefix, 9, 9, 9], 10)
    assert outputs.tokens("other") == expected.tokens("other")


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_several_answers_to_a_cold_prompt_compute_it_once_and_are_what_each_is_alone(start_router, prefix_caching):
    prompt = prompt_of(5, 100)
    alone, expected = start_router()
    for i in range(4):
        ask(alone.engine, f"r{i}", prompt, 12, temperature=0.9, seed=i)
        expected.wait(f"r{i}")
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=64)
    router, outputs = start_router(prefix_caching=prefix_caching, limits=limits)

    def ask_all(name: str) -> None:
        for i in range(4):
            first_id = f"{name}0" if i else None
            ask(router.engine, f"{name}{i}", prompt, 12, first_id=first_id, temperature=0.9, seed=i)

    router.engine.call(lambda: ask_all("r"))
    assert [outputs.tokens(f"r{i}") for i in range(4)] == [expected.tokens(f"r{i}") for i in range(4)]
    assert router.engine.stats.num_prompt_tokens == 100 + 3 * (100 - 96)
    wait_until(lambda: not router.engine.scheduler.has_work)
    router.engine.scheduler.check_integrity()
    ask_all("again")
    assert outputs.tokens("again3") == outputs.tokens("r3")
    assert outputs.chunks["again0"][0].num_cached_tokens == (96 if prefix_caching else 0)


def test_whoever_waits_for_anothers_prefix_goes_on_alone_when_that_one_leaves(start_router):
    router, outputs = start_router(limits=SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16))
    prompt = prompt_of(5, 120)

    def both() -> None:
        ask(router.engine, "first", prompt, 5)
        ask(router.engine, "second", [*prompt[:90], 7], 5)

    waited: list[str] = []

    def leave_half_way() -> None:
        waited.extend(s.request.request_id for s in router.engine.scheduler.waiting)
        router.engine.abort("test", "first")

    router.engine.call(both)
    between_steps(router.engine, lambda: router.engine.stats.num_prompt_tokens >= 32, leave_half_way)
    assert len(outputs.tokens("second")) == 5
    assert waited == ["second"] and not outputs.chunks["first"]
    ask(router.engine, "again", [*prompt[:90], 7], 5)
    assert outputs.tokens("again") == outputs.tokens("second")


def waiting(blocks: BlockManager, arrival: int, ids: list[int]) -> Sequence:
    request = GenerateRequest(request_id=str(arrival), prompt_ids=tuple(ids), sampling=SamplingParams())
    return Sequence(
        request=request, owner="o", arrival=arrival, deadline=1e9, table=blocks.new_table(), token_ids=list(ids)
    )


def test_rivals_are_those_that_decode_and_those_that_could_be_given_prompt_tokens():
    blocks = BlockManager([BlockPool(64)], [None], block_size=16, prefix_caching=False)
    scheduler = Scheduler(SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=50), blocks)
    for arrival, length in enumerate([20, 20, 20, 20, 20, 20]):
        scheduler.add(waiting(blocks, arrival, prompt_of(arrival, length)))
    assert scheduler.rivals() == (0, 4), "two have no seat"
    work = scheduler.schedule()
    scheduler.commit(work)
    assert [item.end - item.begin for item in work] == [20, 20, 10]
    for item in work:
        if item.samples:
            item.sequence.token_ids.append(5)
    assert scheduler.rivals() == (2, 2), "one half computed, one for the free seat"
    assert len(scheduler.schedule(prefill_budget=12)) == 4


def test_whoever_waits_for_a_prefix_keeps_its_seat_and_computes_only_the_rest():
    blocks = BlockManager([BlockPool(64)], [None], block_size=16, prefix_caching=True)
    scheduler = Scheduler(SchedulerLimits(max_num_seqs=2, max_num_batched_tokens=512), blocks)
    prompt = prompt_of(0, 100)
    for arrival, ids in enumerate([prompt, prompt, prompt_of(1, 30)]):
        scheduler.add(waiting(blocks, arrival, ids))
    steps = []
    for _ in range(2):
        work = scheduler.schedule()
        steps.append([(item.sequence.arrival, item.begin, item.end) for item in work])
        scheduler.commit(work)
        for item in work:
            item.sequence.token_ids.append(7)
    assert steps == [[(0, 0, 100)], [(0, 100, 101), (1, 96, 100)]]
    assert [sequence.arrival for sequence in scheduler.waiting] == [2]
    scheduler.check_integrity()


def test_prompts_too_long_bad_ids_and_full_queues_are_refused_with_numbers(start_router):
    router, outputs = start_router(
        limits=SchedulerLimits(max_num_seqs=1, max_num_batched_tokens=64, max_queue=2), max_model_len=128
    )
    ask(router.engine, "long", prompt_of(0, 128))
    error = outputs.wait("long")[-1].error
    assert error["status"] == 400 and "128 tokens" in error["message"] and error["code"] == "context_length_exceeded"
    ask(router.engine, "bad", [5, 320])
    assert "token id 320" in outputs.wait("bad")[-1].error["message"]
    router.engine.call(lambda: [ask(router.engine, f"r{i}", prompt_of(i, 20), 10) for i in range(5)])
    ends = [outputs.wait(f"r{i}")[-1] for i in range(5)]
    assert [end.finish_reason for end in ends] == ["length", "length", "error", "error", "error"]
    assert all(end.error["status"] == 503 and end.error["code"] == "queue_full" for end in ends[2:])


def test_an_abort_frees_the_blocks_and_nobody_else_notices(start_router):
    router, outputs = start_router()
    ask(router.engine, "keep", prompt_of(1, 30), 60)
    ask(router.engine, "drop", prompt_of(2, 30), 400)
    between_steps(router.engine, lambda: len(outputs.chunks["drop"]) > 3, lambda: router.engine.abort("test", "drop"))
    kept = outputs.tokens("keep")
    assert 3 < len(outputs.chunks["drop"]) < 6 and outputs.chunks["drop"][-1].finish_reason is None
    wait_until(lambda: not router.engine.scheduler.has_work)
    assert [pool.num_used for pool in router.engine.scheduler.blocks.pools] == [0, 0]
    ask(router.engine, "alone", prompt_of(1, 30), 60)
    assert outputs.tokens("alone") == kept


def test_replayed_requests_continue_with_the_tokens_they_would_have_had(start_router):
    router, outputs = start_router()
    params = SamplingParams(temperature=0.8, seed=11, max_tokens=30, ignore_eos=True)
    prompt = tuple(prompt_of(3, 25))
    router.engine.submit("test", GenerateRequest(request_id="whole", prompt_ids=prompt, sampling=params))
    whole = outputs.tokens("whole")
    replay = GenerateRequest(request_id="rest", prompt_ids=prompt, output_ids=tuple(whole[:13]), sampling=params)
    router.engine.submit("test", replay)
    assert outputs.tokens("rest") == whole[13:]


def test_deadlines_end_requests_that_wait_too_long(start_router):
    router, outputs = start_router()
    request = GenerateRequest(
        request_id="late",
        prompt_ids=tuple(prompt_of(0, 10)),
        sampling=SamplingParams(max_tokens=500, ignore_eos=True),
        deadline_s=0.0,
    )
    router.engine.submit("test", request)
    assert outputs.wait("late")[-1].error["code"] == "deadline_exceeded"


def test_a_grammar_holds_from_the_first_token(start_router, tiny_model):
    from model.sampling_params import StructuredSpec
    from model.structured import GrammarCompiler
    from model.tokenizer import Tokenizer

    router, outputs = start_router()
    tokenizer = Tokenizer.from_directory(tiny_model)
    compiler = GrammarCompiler(tokenizer, 320, [2])
    spec = StructuredSpec("regex", "(whale|storm) [0-9]{3}")
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=40, structured=spec)
    request = GenerateRequest(request_id="g", prompt_ids=tuple(prompt_of(0, 10)), sampling=params)
    router.engine.submit("test", request, compiler.compile(spec))
    text = tokenizer.decode(outputs.tokens("g"), skip_special_tokens=True)
    import re

    assert re.fullmatch(r"(whale|storm) [0-9]{3}", text)


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_pooling_gives_one_row_or_one_per_token_whatever_the_chunks(start_router, tokens):
    router, outputs = start_router(limits=SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=16))
    prompt = tuple(prompt_of(0, 50))
    router.engine.submit("test", PoolRequest(request_id="p", prompt_ids=prompt, head="", tokens=tokens))
    assert outputs.rows("p").shape == (1 if tokens == "last" else 50, 64)
    assert outputs.chunks["p"][-1].finish_reason == "stop"


def test_rows_are_delivered_as_they_are_made_and_never_many_at_once(start_router, tmp_path):
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=800)
    model = write_tiny_model(tmp_path / "long", max_position_embeddings=2048)
    router, outputs = start_router(model=model, limits=limits)
    deliveries = []
    deliver = router.engine._deliver
    router.engine._deliver = lambda outbox: (deliveries.append(outbox), deliver(outbox))
    pool = PoolRequest(request_id="p", prompt_ids=tuple(prompt_of(0, 1000)), head="", tokens="all")
    router.engine.submit("test", pool)
    assert outputs.rows("p").shape == (1000, 64)
    sizes = [sum(len(row) for chunk in outbox["test"] for row in chunk.values) for outbox in deliveries]
    assert len(sizes) == 3 and max(sizes) <= ROW_CHARS_AT_ONCE, "800 rows are more than that"
    assert [chunk.first_row for chunk in outputs.chunks["p"]] == [0, ROW_CHARS_AT_ONCE // 344, 800]


def test_pooled_rows_are_one_per_token_after_a_preemption_too(start_router):
    prompt = tuple(prompt_of(0, 80))
    pool = PoolRequest(request_id="p", prompt_ids=prompt, head="", tokens="all")
    alone, expected = start_router()
    alone.engine.submit("test", pool)
    router, outputs = start_router(limits=SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=16))
    scheduler = router.engine.scheduler

    def preempt_half_way() -> None:
        if scheduler.running and scheduler.running[0].num_computed >= 32:
            scheduler._preempt(scheduler.running[0])
        else:
            router.engine.call(preempt_half_way)

    router.engine.call(preempt_half_way)
    router.engine.submit("test", pool)
    rows, right = outputs.rows("p"), expected.rows("p")
    assert scheduler.num_preemptions == 1
    assert len(rows) == 80 and torch.allclose(rows, right, atol=1e-4)


def test_a_pool_request_may_fill_the_whole_cache(start_router):
    router, outputs = start_router(num_kv_blocks=9, max_model_len=128)
    router.engine.submit("test", PoolRequest(request_id="p", prompt_ids=tuple(prompt_of(0, 128)), head=""))
    ask(router.engine, "behind", prompt_of(1, 10), 3)
    assert len(outputs.rows("p")) == 1 and len(outputs.tokens("behind")) == 3


def test_what_an_owner_that_left_had_just_sent_is_not_computed(start_router):
    router, _ = start_router()

    def send_and_leave() -> None:  # both lie in the inbox when the step ends
        ask(router.engine, "a", prompt_of(0, 10), 400)
        router.engine.abort_all("test")

    router.engine.call(send_and_leave)
    seen: list[bool] = []

    def look(later: int) -> None:
        seen.append(router.engine.scheduler.has_work)
        if later:
            router.engine.call(lambda: look(later - 1))

    router.engine.call(lambda: look(4))
    wait_until(lambda: len(seen) == 5)
    assert not any(seen)


def test_a_replay_tells_of_the_experts_that_the_first_router_has_not_told_of(start_router):
    router, outputs = start_router()
    common = {"prompt_ids": tuple(prompt_of(0, 40)), "return_routed_experts": True}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    router.engine.submit("test", GenerateRequest(request_id="whole", sampling=sampling, **common))
    chunks = outputs.wait("whole")
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    rows = [row for chunk in chunks for row in chunk.routed_experts]
    router.engine.submit(
        "test", GenerateRequest(request_id="rest", sampling=sampling, output_ids=tuple(tokens[:3]), **common)
    )
    rest = outputs.wait("rest")
    assert [token for chunk in rest for token in chunk.token_ids] == tokens[3:]
    assert [row for chunk in rest for row in chunk.routed_experts] == rows[40 + 2 :]


def test_routed_experts_name_every_token_once_with_the_gates_choice(start_router):
    router, outputs = start_router(limits=SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16))
    request = GenerateRequest(
        request_id="e",
        prompt_ids=tuple(prompt_of(0, 40)),
        sampling=SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        return_routed_experts=True,
    )
    router.engine.submit("test", request)
    chunks = outputs.wait("e")
    rows = [row for chunk in chunks for row in chunk.routed_experts]
    assert len(rows) == 40 + 4  # the last token drawn has not been through the model
    assert all(len(layers) == 3 and all(len(set(ids)) == 3 for ids in layers) for layers in rows)


def test_prompt_logprobs_cover_the_prompt_whatever_the_chunks(start_router, tiny_model):
    import torch

    router, outputs = start_router(limits=SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16))
    prompt = prompt_of(2, 50)
    ask(router.engine, "p", prompt, 3, prompt_logprobs=2)
    scores = outputs.wait("p")[0].prompt_logprobs
    assert scores[0] is None and len(scores) == 50
    with torch.no_grad():
        expected = load_oracle(tiny_model)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for i in range(1, 50):
        assert scores[i][0][0] == prompt[i]
        assert abs(scores[i][0][1] - float(expected[i - 1, prompt[i]])) < 1e-3
        assert scores[i][1][0] == int(expected[i - 1].argmax())


def test_a_step_that_fails_ends_its_requests_and_the_next_one_works(start_router):
    router, outputs = start_router()
    decoder = router.engine.model.decoder

    class Broken:
        config = decoder.config

        def forward(self, *_: object) -> None:
            raise RuntimeError("out of luck")

    model = router.engine.model
    router.engine.call(lambda: object.__setattr__(model, "decoder", Broken()))
    ask(router.engine, "unlucky", [5, 6, 7])
    assert outputs.wait("unlucky")[-1].error["status"] == 500
    router.engine.call(lambda: object.__setattr__(model, "decoder", decoder))
    ask(router.engine, "fine", [5, 6, 7])
    assert len(outputs.tokens("fine")) == 24


def test_a_schedule_that_fails_is_told_to_everybody_not_to_the_step_before(start_router):
    router, outputs = start_router(limits=SchedulerLimits(max_num_seqs=1, max_num_batched_tokens=64))
    scheduler = router.engine.scheduler
    schedule = scheduler.schedule

    def fail_once(prefill_budget):
        scheduler.schedule = schedule
        raise RuntimeError("the books don't balance")

    def ask_both():
        ask(router.engine, "running", [3, 4, 5], 400)
        ask(router.engine, "waiting", [3, 4, 6], 400)

    router.engine.call(ask_both)
    wait_until(lambda: len(outputs.chunks["running"]) > 2)
    router.engine.call(lambda: setattr(scheduler, "schedule", fail_once))
    for name in ("running", "waiting"):
        assert outputs.wait(name)[-1].error["code"] == "internal_error"
    ask(router.engine, "later", [3, 4, 5])
    assert len(outputs.tokens("later")) == 24


def test_a_call_that_fails_ends_neither_the_loop_nor_the_calls_behind_it(start_router):
    router, _ = start_router()
    called = threading.Event()

    def fail() -> None:
        raise RuntimeError("the store is gone")

    router.engine.call(fail)
    router.engine.call(called.set)
    assert called.wait(60)
