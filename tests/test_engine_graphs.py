"""The engine's steps as CUDA graphs, on a CPU: what a graph would freeze must not change from step to step."""

from __future__ import annotations

import inspect
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.graphs import GraphRecorder
from chatglm_ptuning.serving.engine.passes import Passes, Sizes, make_cache
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.engine.request import EngineError, SamplingSettings

VOCABULARY, SLOTS, SLOT_TOKENS = 96, 6, 300
NAMES = (None, "a", "b", "projected")


class Replay(TorchDispatchMode):
    """A stand-in for a CUDA graph: the calls of a step with their tensors, repeated into the same tensors."""

    def __init__(self, step) -> None:
        super().__init__()
        self.calls, self.replays = [], 0
        step()
        with self:
            self.results = step()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results

    def __call__(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
            if function._schema.is_mutable:
                function(*args, **kwargs)
            elif any(tensor.untyped_storage().data_ptr() not in given for tensor in tensors_of(results)):
                for target, value in zip(tensors_of(results), tensors_of(function(*args, **kwargs)), strict=True):
                    target.copy_(value)
            # Else the results are views, which see what their tensors hold now.
        return self.results


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


FORBIDDEN = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique2",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "lift_fresh", "_pin_memory", "bincount",
}  # fmt: skip
"""Operations that wait for the GPU, have results whose size depends on values, or take numbers from Python."""


class OnlyRecordable(TorchDispatchMode):
    """Fails on operations that cannot be recorded."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        assert name not in FORBIDDEN, f"{name} cannot be recorded"
        if name.startswith("index"):
            assert all(one.dtype != torch.bool for one in tensors_of(args[1])), "an index of bool waits for the GPU"
        before = {one.device for one in tensors_of((args, kwargs or {})) if one.ndim}
        results = function(*args, **kwargs or {})
        devices = before | {one.device for one in tensors_of(results)}
        assert len(devices) <= 1, f"{name} copies from one device to another: {devices}"
        return results


@pytest.fixture(scope="module")
def model(tiny_base):
    from chatglm_ptuning import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained(tiny_base, dtype=torch.float32)


@pytest.fixture
def recorded(monkeypatch):
    """Makes engines record their steps; what they have recorded."""
    found = []

    def use(record) -> list:
        def record_and_keep(step):
            found.append(record(step))
            return found[-1]

        class Recorded(Passes):
            def __init__(self, model, cache, sizes, record):
                super().__init__(model, cache, Sizes(cache.slots, cache.slot_tokens, True), record_and_keep)

        monkeypatch.setattr("chatglm_ptuning.serving.engine.scheduler.Passes", Recorded)
        return found

    return use


@pytest.fixture
def engine_of(model, prefix_folders, tmp_path):
    """Starts engines on the tiny base with three prefixes."""
    engines = []
    for name, path in prefix_folders.items():
        shutil.copytree(path, tmp_path / name)

    def start(**changes) -> Engine:
        settings = {"slots": SLOTS, "slot_tokens": SLOT_TOKENS, "prefill_chunk": 16}
        engines.append(Engine(model, **settings | {"prefix_source": PrefixFolder(tmp_path)} | changes).start())
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(engine: Engine) -> list[list[int]]:
    """Of requests of all kinds, more than there are slots: lengths in two sizes of places, all prefixes, settings."""
    kinds = (
        {},
        {"temperature": 0.9, "top_p": 0.8},
        {"repetition_penalty": 1.4},
        {"temperature": 1.0, "top_logprobs": 2},
    )
    generations = [
        engine.submit(
            prompt_of(200 if number % 7 == 6 else 3 + 5 * number % 31, number),
            SamplingSettings(56 if number % 7 == 6 else 4 + 3 * number % 20, seed=number, **kinds[number % 4]),
            NAMES[number // 3 % 4],
        )
        for number in range(28)
    ]
    return [[token.id for token in generation] for generation in generations]


def test_replayed_steps_give_the_tokens_of_called_steps(engine_of, recorded):
    expected = answers(engine_of())
    replays = recorded(Replay)
    assert answers(engine_of()) == expected
    assert len(replays) >= 6  # sizes of rows and of places
    assert sum(replay.replays for replay in replays) > 60


def test_replayed_steps_give_the_tokens_with_attention_in_the_open(engine_of, recorded, model):
    model.set_attn_implementation("eager")
    expected = answers(engine_of())
    recorded(Replay)
    assert answers(engine_of()) == expected
    model.set_attn_implementation("sdpa")


def test_a_step_does_nothing_that_cannot_be_recorded(engine_of, recorded):
    """And its inputs and results stay where they are."""

    def checked(step):
        places = set()

        def call():
            with OnlyRecordable():
                results = step()
            places.add(tuple(one.shape for one in results))
            return results

        call.places = places
        return call

    calls = recorded(checked)
    expected = answers(engine_of())
    assert len(calls) >= 6
    assert all(len(call.places) == 1 for call in calls)
    assert all(expected)


def test_the_checks_find_what_cannot_be_recorded():
    values = torch.arange(4.0)
    for operation in (
        lambda: values.sum().item(),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: torch.tensor([1.0, 2.0]) + values[:2],
        lambda: bool((values > 1).any()),
        lambda: values.to("meta"),
    ):
        with pytest.raises(AssertionError), OnlyRecordable():
            operation()
    state = {"number": 1.0}
    replay = Replay(lambda: (values * state["number"], values + 0))
    state["number"] = 2.0
    values.add_(1)
    stale, fresh = replay()
    assert stale.tolist() == [1, 2, 3, 4]  # a number from Python stays
    assert fresh.tolist() == [1, 2, 3, 4]


def test_rows_that_only_fill_up_a_step_leave_nothing_behind(engine_of, recorded, model):
    """A prompt whose scores are not finite is computed in a slot that steps fill up, and which others then get."""
    recorded(Replay)

    def poison(module, inputs, states):
        return states.masked_fill((inputs[0] == 50)[..., None], torch.nan)

    clean = [
        [51 if one == 50 else one for one in prompt_of(length, seed)] for length, seed in ((9, 1), (40, 2), (40, 3))
    ]
    bad = [50, *prompt_of(60, 4)]

    def run(engine, *prompts) -> list:
        first = engine.submit(clean[0], SamplingSettings(60), "a")
        next(first)
        others = [engine.submit(prompt, SamplingSettings(20)) for prompt in prompts]
        found = [[token.id for token in first][-20:]]
        for other in others:
            try:
                found.append([token.id for token in other])
            except EngineError:
                found.append(None)
        return found

    expected = run(engine_of(slot_tokens=128), clean[1], clean[2])
    handle = model.transformer.embedding.register_forward_hook(poison)
    found = run(engine_of(slot_tokens=128), bad, clean[1], bad, clean[2])
    handle.remove()
    assert found == [expected[0], None, expected[1], None, expected[2]]


def test_a_step_of_a_large_base_stays_on_its_device():
    """The device without values stands for a GPU: a value that is looked at, or comes from the CPU, is an error."""
    from chatglm_ptuning import ChatGLMForConditionalGeneration
    from chatglm_ptuning.estimation.sizes import find_config

    with torch.device("meta"):
        base = ChatGLMForConditionalGeneration._from_config(find_config("chatglm3-6b"), dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        passes = Passes(base, make_cache(base, 64, 1000), Sizes(64, 1000, True), lambda step: step)
        steps = ((torch.zeros(3, 64, 1).long(), None), (torch.zeros(3, 4, 32).long(), torch.zeros(2, 4).long()))
        for inputs, ends in steps:
            inputs, ends = inputs.to("meta"), None if ends is None else ends.to("meta")
            with OnlyRecordable():
                logits, best = passes._forward(inputs, ends, 1000)
            assert (logits.shape, logits.dtype) == ((inputs.shape[1], 65024), torch.bfloat16)
            assert (best.shape, best.dtype) == ((2, inputs.shape[1]), torch.int64)


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_step_is_recorded_on_the_stream_it_was_warmed_up_on(monkeypatch, has_memory):
    """With a stand-in for torch.cuda that notes what it is told."""
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append((names[self], "waits for", names[other]))

        def synchronize(self):
            events.append((names[self], "is finished"))

    main, side = Stream(), Stream()
    names = {main: "main", side: "side"}

    @contextmanager
    def use(stream):
        events.append(("enter", names[stream]))
        try:
            yield
        finally:
            events.append(("leave", names[stream]))

    real = inspect.signature(torch.cuda.graph)

    @contextmanager
    def capture(*args, **kwargs):
        given = real.bind(*args, **kwargs).arguments
        assert given["stream"] is side and given["pool"] == "pool" and given["capture_error_mode"] == "thread_local"
        events.append("capture")
        if not has_memory:
            raise torch.cuda.OutOfMemoryError("no memory")
        yield

    graph = SimpleNamespace(replay=lambda: events.append("replay"))
    for name, value in {
        "Stream": lambda device: side, "current_stream": lambda device: main, "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: graph, "stream": use, "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def step():
        events.append("step")
        return "results"

    run = GraphRecorder(torch.device("cuda"))(step)
    before = [("enter", "side"), ("side", "waits for", "main"), "step", ("main", "waits for", "side"), "capture"]
    if has_memory:
        assert events == [*before, "step", ("leave", "side")]
        assert run() == "results" and events[-1] == "replay"
    else:
        assert events == [*before, ("leave", "side"), ("side", "is finished")]
        assert run is step
