"""The serving engine: its answers are those of single runs, whatever else it does."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_runs import VOCABULARY, SingleRuns, ids_of, prompt_of

from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.passes import Passes, Sizes
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.engine.request import (
    EngineError,
    PromptTooLong,
    QueueFull,
    SamplingSettings,
    Token,
    UnknownPrefix,
)
from chatglm_ptuning.serving.engine.sampling import choose, most_probable
from chatglm_ptuning.serving.engine.scheduler import Scheduler

NAMES = (None, "a", "b", "projected")


@pytest.fixture
def model(load):
    return load(dtype=torch.float32)


@pytest.fixture
def folder(prefix_folders, tmp_path):
    """A folder with the prefixes a, b and projected."""
    for name, path in prefix_folders.items():
        shutil.copytree(path, tmp_path / "served" / name)
    return tmp_path / "served"


@pytest.fixture
def start(model, folder):
    """Starts an engine on the tiny base, with small sizes."""
    engines = []

    def make(**changes) -> Engine:
        settings = {"slots": 4, "slot_tokens": 80, "prefill_chunk": 16, "prefix_source": PrefixFolder(folder)}
        engines.append(Engine(model, **settings | changes).start())
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def alone(tiny_base, prefix_folders):
    return SingleRuns(tiny_base, prefix_folders)


@pytest.fixture
def slow(model):
    """Makes each forward pass of the engine's model wait for a moment."""
    handle = model.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    yield
    handle.remove()


REQUESTS = [(prompt_of(1 + 7 * number % 40, number), 1 + 5 * number % 23, NAMES[number % 4]) for number in range(24)]
"""Prompts of 1 to 40 tokens, answers of 1 to 23, and all prefixes."""


def test_mixed_requests_answer_as_single_runs(start, alone):
    engine = start()
    generations = [engine.submit(prompt, SamplingSettings(count), name) for prompt, count, name in REQUESTS]
    for generation, (prompt, count, name) in zip(generations, REQUESTS, strict=True):
        assert ids_of(generation) == alone(prompt, count, name)
        assert generation.finish_reason == "length"
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.requests) == (0, 0, {"length": 24})
    assert stats.generated_tokens == sum(count for _, count, _ in REQUESTS)
    assert stats.prefill_tokens + stats.cached_tokens == sum(len(prompt) for prompt, _, _ in REQUESTS)


def test_requests_that_join_later_answer_as_single_runs(start, alone, slow):
    engine = start(slots=3)
    first = engine.submit(prompt_of(9), SamplingSettings(30), "b")
    next(first)
    others = [engine.submit(prompt_of(20, seed), SamplingSettings(2 + seed), name) for seed, name in enumerate(NAMES)]
    for seed, (generation, name) in enumerate(zip(others, NAMES, strict=True)):
        assert ids_of(generation) == alone(prompt_of(20, seed), 2 + seed, name)
    assert ids_of(first) == alone(prompt_of(9), 30, "b")[1:]


def test_running_answers_go_on_while_a_long_prompt_is_computed(start, slow):
    engine = start(prefill_chunk=4)
    running = engine.submit(prompt_of(3), SamplingSettings(40))
    next(running)
    late = engine.submit(prompt_of(40, 1), SamplingSettings(1))
    assert next(late).id >= 0
    assert running.get(0) is not None  # tokens were made during the 10 parts of the prompt
    assert running._tokens.qsize() >= 6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_of_any_size_give_the_same_answer(start, alone, model, implementation, chunk):
    model.set_attn_implementation(implementation)
    engine = start(prefill_chunk=chunk)
    assert ids_of(engine.submit(prompt_of(33), SamplingSettings(8), "a")) == alone(prompt_of(33), 8, "a")


def test_prompts_that_begin_alike_share_their_beginning(start, alone):
    engine = start()
    prompt = prompt_of(20)
    first = engine.submit(prompt, SamplingSettings(6), "a")
    answer = ids_of(first)
    longer = [*prompt, *answer, *prompt_of(5, 1)]
    following = engine.submit(longer, SamplingSettings(6), "a")
    assert ids_of(following) == alone(longer, 6, "a")
    assert first.cached_tokens == 0
    assert following.cached_tokens == 25  # the last token of the answer was never an input
    other = engine.submit(longer, SamplingSettings(6), "b")
    assert ids_of(other) == alone(longer, 6, "b")
    assert other.cached_tokens == 0


def test_a_running_request_shares_its_prompt(start, alone, slow):
    engine = start()
    prompt = prompt_of(20)
    running = engine.submit(prompt, SamplingSettings(20), "b")
    next(running)
    branches = [engine.submit([*prompt[:15], *prompt_of(4, seed)], SamplingSettings(5), "b") for seed in range(1, 4)]
    for seed, branch in enumerate(branches, 1):
        assert ids_of(branch) == alone([*prompt[:15], *prompt_of(4, seed)], 5, "b")
        assert branch.cached_tokens >= 15
    again = engine.submit(prompt, SamplingSettings(20), "b")
    assert ids_of(again) == alone(prompt, 20, "b") == [alone(prompt, 1, "b")[0], *ids_of(running)]
    assert again.cached_tokens == 19


def test_equal_prompts_that_arrive_together_are_computed_once(start, alone, slow):
    engine = start(slots=5)
    running = engine.submit(prompt_of(3), SamplingSettings(1))
    prompt, other = prompt_of(40, 1), [*prompt_of(40, 1)[:30], *prompt_of(8, 2)]
    together = [engine.submit(prompt, SamplingSettings(6), "a") for _ in range(3)]
    together.append(engine.submit(other, SamplingSettings(6), "a"))
    assert [ids_of(one) for one in together] == [alone(prompt, 6, "a")] * 3 + [alone(other, 6, "a")]
    assert ids_of(running) == alone(prompt_of(3), 1)
    stats = engine.stats()
    assert stats.prefill_tokens <= 3 + 40 + 16 + 2 + 8  # 16: a part of the second may be computed beside the first
    assert stats.prefill_tokens + stats.cached_tokens == 3 + 3 * 40 + 38


def test_kept_rows_are_overwritten_least_recently_used_first(start, alone):
    engine = start(slots=2)
    first, second, third = (prompt_of(12, seed) for seed in range(3))
    for prompt in (first, second, first, third):
        ids_of(engine.submit(prompt, SamplingSettings(3)))
    generation = engine.submit(first, SamplingSettings(3))
    assert ids_of(generation) == alone(first, 3)
    assert generation.cached_tokens == 11
    assert engine.submit(second, SamplingSettings(3)).get() is not None
    stats = engine.stats()
    assert stats.evictions >= 1
    assert stats.slots_kept + stats.running == 2


def test_sharing_a_row_counts_as_its_use(start):
    engine = start(slots=3)
    prompt = prompt_of(20)
    for one in (prompt, prompt_of(20, 1), prompt_of(20, 2), [*prompt[:10], *prompt_of(5, 3)]):
        ids_of(engine.submit(one, SamplingSettings(3)))
    again = engine.submit(prompt, SamplingSettings(3))
    ids_of(again)
    assert again.cached_tokens == 19


def test_prompts_are_computed_oldest_first_in_parts_of_the_chunk(start, model, slow):
    engine = start(prefill_chunk=8)
    sizes = []
    model.transformer.embedding.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].numel()))
    first = engine.submit(prompt_of(30), SamplingSettings(1))
    others = [engine.submit(prompt_of(length, length), SamplingSettings(1)) for length in (25, 3, 3)]
    for generation in (first, *others):
        ids_of(generation)
    assert all(first.first_token_at < other.first_token_at for other in others)
    assert max(sizes) == 8


def test_a_seed_gives_the_same_tokens_in_any_company(start):
    engine = start()
    settings = SamplingSettings(12, temperature=1.3, top_p=0.9, seed=7)
    expected = ids_of(engine.submit(prompt_of(8), settings, "a"))
    company = [engine.submit(prompt_of(5 + seed, seed), SamplingSettings(9, temperature=2.0)) for seed in range(3)]
    assert ids_of(engine.submit(prompt_of(8), settings, "a")) == expected
    others = {tuple(ids_of(engine.submit(prompt_of(8), SamplingSettings(12, 1.3, 0.9, seed=seed), "a")))
              for seed in range(4)}  # fmt: skip
    assert len(others) > 1
    assert all(len(ids_of(generation)) == 9 for generation in company)


def test_a_penalty_is_that_of_generate(start, alone):
    engine = start()
    plain = engine.submit(prompt_of(10), SamplingSettings(20))
    penalised = engine.submit(prompt_of(10), SamplingSettings(20, repetition_penalty=1.6))
    assert ids_of(penalised) == alone(prompt_of(10), 20, penalty=1.6)
    assert ids_of(plain) == alone(prompt_of(10), 20)


def test_a_stop_id_ends_the_answer_without_being_part_of_it(start, alone):
    engine = start()
    whole = alone(prompt_of(10), 12)
    stop = whole[5]
    generation = engine.submit(prompt_of(10), SamplingSettings(12, stop_ids=(stop, 95)))
    assert ids_of(generation) == whole[: whole.index(stop)]
    assert generation.finish_reason == "stop"
    assert generation.get() is None


def test_log_probabilities_are_those_of_the_model(start, alone):
    engine = start()
    prompt = prompt_of(10)
    tokens = list(engine.submit(prompt, SamplingSettings(6, temperature=0.7, seed=1, top_logprobs=3), "a"))
    none, bare = engine.submit(prompt, SamplingSettings(2)), engine.submit(prompt, SamplingSettings(2, top_logprobs=0))
    ids = torch.tensor([[*prompt, *(token.id for token in tokens)]])
    logits = alone.model(ids, prefix=alone.model.prefix_batch("a")).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        values, places = row.topk(3)
        assert [number for number, _ in token.top] == places.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(token.logprob is None and token.top == () for token in none)
    assert all(token.logprob is not None and token.top == () for token in bare)


def test_a_cancelled_request_frees_its_slot(start, alone, slow):
    engine = start(slots=1)
    long = engine.submit(prompt_of(5), SamplingSettings(60))
    waiting = engine.submit(prompt_of(6), SamplingSettings(60))
    following = engine.submit(prompt_of(7), SamplingSettings(3))
    next(long)
    waiting.cancel()
    long.cancel()
    assert ids_of(following) == alone(prompt_of(7), 3)
    assert len(ids_of(long)) < 59
    assert ids_of(waiting) == []
    assert (long.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    assert engine.stats().requests == {"cancelled": 2, "length": 1}


def test_a_full_queue_refuses_and_says_when_to_try_again(start, slow):
    engine = start(slots=1, queue_limit=1)
    running = engine.submit(prompt_of(5), SamplingSettings(60))
    next(running)
    waiting = engine.submit(prompt_of(5), SamplingSettings(2))
    with pytest.raises(QueueFull) as refused:
        engine.submit(prompt_of(5), SamplingSettings(2))
    assert refused.value.retry_after >= 1
    waiting.cancel()
    assert engine.submit(prompt_of(5), SamplingSettings(2)).finish_reason is None  # its place is free again
    running.cancel()


def test_a_request_that_can_never_fit_is_refused(start, alone):
    engine = start()
    assert ids_of(engine.submit(prompt_of(60), SamplingSettings(17), "a")) == alone(
        prompt_of(60), 17, "a"
    )  # 80 with 3 of "a"
    with pytest.raises(PromptTooLong, match=r"3.*60.*18.*80"):
        engine.submit(prompt_of(60), SamplingSettings(18), "a")
    wide = start(slot_tokens=None)
    with pytest.raises(PromptTooLong, match=r"200.*57.*256"):
        wide.submit(prompt_of(200), SamplingSettings(57))
    assert wide.stats().cache_tokens_total == 4 * (256 + 512)


def test_bad_requests_are_refused(start):
    engine = start()
    for prompt in ([], [VOCABULARY], [-1], [2**70], [1.5], [[3]], ["3"]):
        with pytest.raises(ValueError, match=r"token|Token"):
            engine.submit(prompt, SamplingSettings(3))
    for name in ("c", "../served/a", "a/", ".", "", "base"):
        with pytest.raises(UnknownPrefix, match="prefix"):
            engine.submit(prompt_of(3), SamplingSettings(3), name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", True), ("temperature", -1), ("temperature", float("nan")),
        ("temperature", 1e300), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("repetition_penalty", 0),
        ("repetition_penalty", 1e300), ("seed", 1.5), ("stop_ids", ("x",)), ("top_logprobs", -1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingSettings(**{"max_new_tokens": 1} | {name: value})


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit(1)])
def test_a_worker_that_dies_starts_again(start, alone, model, slow, error):
    engine = start(slots=2)
    running = [engine.submit(prompt_of(5, seed), SamplingSettings(60)) for seed in range(2)]
    waiting = engine.submit(prompt_of(5), SamplingSettings(4), "a")
    for generation in running:
        next(generation)

    def fail(*_):
        handle.remove()
        raise error

    handle = model.transformer.register_forward_pre_hook(fail)
    for generation in running:
        with pytest.raises(EngineError, match=type(error).__name__):
            ids_of(generation)
        assert generation.finish_reason == "error"
    assert ids_of(waiting) == alone(prompt_of(5), 4, "a")
    assert engine.stats().restarts == 1


def test_a_worker_that_cannot_start_refuses_what_waits(start, alone, monkeypatch):
    engine = start(slots=1)
    for seed in range(2):
        ids_of(engine.submit(prompt_of(5, seed), SamplingSettings(2)))
    reset, step, failures = Scheduler.reset, Scheduler.step, [RuntimeError("no memory"), KeyError("a step failed")]

    submitted = threading.Event()

    def fail(method):
        def failing(scheduler):
            if failures:
                submitted.wait(10)
                raise failures.pop()
            method(scheduler)

        return failing

    monkeypatch.setattr("chatglm_ptuning.serving.engine.engine._SECONDS_BETWEEN_RESETS", 0.01)
    monkeypatch.setattr(Scheduler, "reset", fail(reset))
    monkeypatch.setattr(Scheduler, "step", fail(step))
    asked = [engine.submit(prompt_of(5), SamplingSettings(60)) for _ in range(2)]
    submitted.set()
    for generation in asked:
        with pytest.raises(EngineError, match=r"KeyError|RuntimeError"):
            generation.get(10)
    assert ids_of(engine.submit(prompt_of(5), SamplingSettings(4))) == alone(prompt_of(5), 4)
    stats = engine.stats()
    assert (stats.restarts, stats.evictions) == (2, 2)


def test_a_new_start_forgets_numbers_that_are_not_finite(start, alone, model):
    engine = start(slots=1, prefill_chunk=8)
    steps = []

    def poison(module, inputs, states):
        steps.append(1)
        if len(steps) == 2:
            raise RuntimeError
        return torch.full_like(states, torch.nan)

    handle = model.transformer.embedding.register_forward_hook(poison)
    with pytest.raises(EngineError, match="RuntimeError"):
        ids_of(engine.submit(prompt_of(20), SamplingSettings(3)))
    handle.remove()
    assert ids_of(engine.submit(prompt_of(3), SamplingSettings(6))) == alone(prompt_of(3), 6)


def test_scores_that_are_not_finite_end_one_request_only(start, alone, model):
    engine = start(slots=2)

    def poison(module, inputs, states):
        return states.masked_fill((inputs[0] == 50)[..., None], torch.nan)

    handle = model.transformer.embedding.register_forward_hook(poison)
    prompt = [51 if number == 50 else number for number in prompt_of(12)]
    good, bad = (
        engine.submit(prompt, SamplingSettings(5), "a"),
        engine.submit([*prompt[:8], 50, 7], SamplingSettings(5), "a"),
    )
    with pytest.raises(EngineError, match="NaN"):
        ids_of(bad)
    expected = alone(prompt, 5, "a")
    assert ids_of(good) == expected
    handle.remove()
    again = [engine.submit(prompt, SamplingSettings(5), name) for name in ("a", "a", None)]
    assert [ids_of(generation) for generation in again] == [expected, expected, alone(prompt, 5)]
    assert engine.stats().restarts == 0


@pytest.mark.parametrize("bad_prompt", [[50, *prompt_of(40)], [*prompt_of(40), 50]])
def test_no_number_that_is_not_finite_stays_in_another_slot(alone, model, folder, bad_prompt):
    """A request whose prompt waits behind a poisoned one moves to its slot, with fewer entries."""
    engine = Engine(model, slots=3, slot_tokens=80, prefill_chunk=16, prefix_source=PrefixFolder(folder))
    model.transformer.embedding.register_forward_hook(
        lambda module, inputs, states: states.masked_fill((inputs[0] == 50)[..., None], torch.nan)
    )
    prompt = [51 if number == 50 else number for number in prompt_of(9)]
    bad = engine.submit(bad_prompt, SamplingSettings(5), "b")
    good = engine.submit(prompt, SamplingSettings(5), "a")
    with engine:
        with pytest.raises(EngineError, match="NaN"):
            ids_of(bad)
        assert ids_of(good) == alone(prompt, 5, "a")


def test_a_cancelled_prompt_leaves_nothing_behind(alone, model):
    """The entries of a prompt that was not computed to its end may not be finite."""
    engine = Engine(model, slots=1, slot_tokens=80, prefill_chunk=4)
    bad = engine.submit(prompt_of(20), SamplingSettings(5))

    def poison(module, inputs, states):
        bad.cancel()
        return torch.full_like(states, torch.nan)

    handle = model.transformer.embedding.register_forward_hook(poison)
    with engine:
        assert ids_of(bad) == []
        assert bad.finish_reason == "cancelled"
        handle.remove()
        for prompt in (prompt_of(1, 1), prompt_of(20)):
            assert ids_of(engine.submit(prompt, SamplingSettings(6))) == alone(prompt, 6)


def test_a_prompt_without_an_answer_is_shared(start, alone):
    engine = start()
    stop = alone(prompt_of(9), 1)
    first, second = (engine.submit(prompt_of(9), SamplingSettings(3, stop_ids=ids)) for ids in (tuple(stop), ()))
    assert (ids_of(first), first.finish_reason) == ([], "stop")
    assert ids_of(second) == alone(prompt_of(9), 3)
    assert second.cached_tokens == 8


def test_closing_ends_all_requests(start, slow):
    engine = start(slots=1)
    running, waiting = (
        engine.submit(prompt_of(5), SamplingSettings(60)),
        engine.submit(prompt_of(5), SamplingSettings(60)),
    )
    next(running)
    engine.close()
    for generation in (running, waiting):
        with pytest.raises(EngineError, match="closed"):
            ids_of(generation)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(prompt_of(5), SamplingSettings(1))
    with pytest.raises(EngineError, match="started"):
        engine.start()


def test_an_engine_is_not_started_after_it_was_closed(model):
    engine = Engine(model, slots=1, slot_tokens=20)
    waiting = engine.submit(prompt_of(3), SamplingSettings(3))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        ids_of(waiting)
    with pytest.raises(EngineError, match="closed"):
        engine.start()


def test_many_threads_may_submit_and_cancel(start, alone):
    engine = start(prefill_chunk=8)
    failures = []

    def client(number: int) -> None:
        for turn in range(6):
            prompt, count, name = REQUESTS[(5 * number + turn) % len(REQUESTS)]
            generation = engine.submit(prompt, SamplingSettings(count), name)
            if (number + turn) % 3 == 0:
                generation.cancel()
                ids_of(generation)
            elif ids_of(generation) != expected[prompt[0], len(prompt), count, name]:
                failures.append((number, turn))
            engine.stats()

    expected = {(prompt[0], len(prompt), count, name): alone(prompt, count, name) for prompt, count, name in REQUESTS}
    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    assert engine.stats().running == engine.stats().waiting == 0


def test_steps_of_static_sizes_give_the_same_answers(start, alone, monkeypatch):
    """As on a GPU, with a recorder that only calls the step, always on the same buffers."""
    recorded = []

    class StaticPasses(Passes):
        def __init__(self, model, cache, sizes, record):
            super().__init__(model, cache, Sizes(cache.slots, cache.slot_tokens, True), record_step)

    def record_step(step):
        recorded.append(step)
        step()  # a recording computes, too
        return step

    monkeypatch.setattr("chatglm_ptuning.serving.engine.scheduler.Passes", StaticPasses)
    engine = start(slots=6)
    generations = [engine.submit(prompt, SamplingSettings(count), name) for prompt, count, name in REQUESTS]
    for generation, (prompt, count, name) in zip(generations, REQUESTS, strict=True):
        assert ids_of(generation) == alone(prompt, count, name)
    assert len(recorded) <= 4 + 2 * 3  # decoding 1, 2, 4 or 6 rows; prompts of 1, 2 or 4 rows, 16 or 32 tokens


@pytest.mark.parametrize("is_static", [False, True])
def test_sizes_are_rounded_up_to_few(is_static):
    sizes = Sizes(100, 5000, is_static)
    found = {sizes.of(rows, places) for rows, places in itertools.product(range(1, 101), (1, 64, 65, 257, 4999, 5000))}
    assert all(rows <= 100 and places <= 5000 for rows, places in found)
    assert sizes.of(100, 5000) == (100, 5000)
    assert len({rows for rows, _ in found}) == (13 if is_static else 100)


def test_sampling_follows_the_distribution(start, alone):
    """Frequencies of 600 draws against the model's probabilities, cut by top_k and top_p as transformers does."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 2000, generator=torch.Generator().manual_seed(3)) * 2
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.8, 5, 1.0), (1.2, 0, 0.3), (1.5, 0, 0.97), (0.9, 8, 0.6)):
        scores = TemperatureLogitsWarper(temperature)(None, logits)
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        expected = TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0]
        settings = SamplingSettings(1, temperature, top_p, top_k)
        # A generator of evenly spaced numbers gives the distribution itself.
        draws = [SimpleNamespace(random=lambda share=(number + 0.5) / 600: share) for number in range(600)]
        whole = logits.expand(600, -1)
        tokens = choose(whole, most_probable(whole), [settings] * 600, [None] * 600, draws)
        frequencies = torch.bincount(torch.tensor([token.id for token in tokens]), minlength=2000) / 600
        assert (frequencies[expected == 0] == 0).all()
        torch.testing.assert_close(frequencies, expected, atol=2.5 / 600, rtol=0)


def test_log_probabilities_are_those_before_the_penalty():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    settings = SamplingSettings(1, repetition_penalty=5.0, top_logprobs=2)
    (token,) = choose(logits, most_probable(logits), [settings], [np.arange(30)], [None])
    assert torch.equal(logits, before)
    assert token.logprob == pytest.approx(logits.log_softmax(-1)[0, token.id].item())


def test_a_limit_above_the_vocabulary_is_none():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    tokens = [
        choose(logits, most_probable(logits), [SamplingSettings(1, 1.5, 0.9, top_k)], [None], [random.Random(3)])
        for top_k in (0, 30, 10**12)
    ]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 100])
def test_extreme_temperatures_are_the_limits(start, alone, temperature):
    engine = start()
    tokens = ids_of(engine.submit(prompt_of(9), SamplingSettings(6, temperature)))
    limited = ids_of(engine.submit(prompt_of(9), SamplingSettings(6, temperature, top_k=1)))
    assert limited == alone(prompt_of(9), 6)
    assert (tokens == limited) == (temperature < 1)


def test_a_token_is_read_with_a_timeout(start, slow):
    engine = start(slots=1)
    running, waiting = (
        engine.submit(prompt_of(5), SamplingSettings(60)),
        engine.submit(prompt_of(5), SamplingSettings(1)),
    )
    assert isinstance(running.get(5), Token)
    with pytest.raises(TimeoutError):
        waiting.get(0.01)
    first = running.first_token_at
    assert first > running.arrived
    assert running.get(5) is not None and running.first_token_at == first
    assert running.prompt_tokens == 5
    running.cancel()
