"""The serving engine under random requests, cancels, failures and changes of prefixes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Hashable
from dataclasses import dataclass

import pytest
import torch
from engine_runs import VOCABULARY, SingleRuns, prompt_of

from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.engine.request import EngineError, Generation, SamplingSettings

REQUESTS = 200
POISON = 50
"""The embedding of this id is NaN."""
LONGEST = 16


class Fault(RuntimeError):
    """Ends the worker."""


@pytest.fixture(scope="module")
def alone(tiny_base, prefix_folders):
    return SingleRuns(tiny_base, prefix_folders)


def prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens, many of which begin alike."""
    trunks = [[51 if token == POISON else token for token in prompt_of(40, seed)] for seed in range(3)]
    chance = random.Random(0)
    found = []
    for _ in range(count):
        whole = list(chance.choice(trunks))
        place = chance.randrange(len(whole))
        if chance.random() < 0.5:
            whole[place:] = [token for token in prompt_of(40 - place, chance.randrange(9)) if token != POISON]
        found.append(whole[: chance.choice((1, 2, place + 1, 40))])
    return found


@dataclass(frozen=True)
class Asked:
    """A request to the engine; `expected` is the whole greedy answer, None if it is not known."""

    generation: Generation
    key: tuple[Hashable, ...]
    expected: list[int] | None
    is_poisoned: bool


class Client:
    """Sends random requests, and compares each answer with a single run, or with an earlier one of the same seed."""

    def __init__(self, engine: Engine, alone: SingleRuns, names: list[str], chance: random.Random) -> None:
        self._engine, self._alone, self._chance = engine, alone, chance
        self._names, self._prompts = [None, *names], prompts(12)
        self._sampled: dict[tuple[Hashable, ...], list[int]] = {}

    def ask(self) -> Asked:
        choice = self._chance.choice
        prompt, name, count = choice(self._prompts), choice(self._names), choice((1, 2, 7, LONGEST))
        kind, expected = choice(("greedy", "greedy", "stop", "sampled", "poisoned")), None
        changes = {"top_logprobs": choice((None, 2))}
        if kind == "poisoned":
            prompt = [*prompt[:30], POISON, *prompt[30:39]]
        elif kind == "sampled":
            changes |= {"temperature": choice((0.5, 1.5)), "top_p": choice((0.6, 1.0)), "top_k": choice((0, 9)),
                        "seed": choice((0, 1))}  # fmt: skip
        else:
            expected = self._alone(prompt, LONGEST, name)[:count]
        if kind == "stop":
            stop = choice(expected)
            expected = expected[: expected.index(stop)]
            changes["stop_ids"] = (stop, VOCABULARY)
        settings = SamplingSettings(count, **changes)
        generation = self._engine.submit(prompt, settings, name)
        return Asked(generation, (tuple(prompt), name, settings), expected, kind == "poisoned")

    def check(self, asked: Asked) -> None:
        """Reads an answer to its end."""
        generation, expected, found = asked.generation, asked.expected, []
        try:
            while (token := generation.get(60)) is not None:
                found.append(token.id)
        except EngineError as error:
            assert "Fault" in str(error) or ("NaN" in str(error) and (asked.is_poisoned or POISON in found))
        if generation.finish_reason in ("cancelled", "error"):
            assert expected is None or found == expected[: len(found)]
        else:
            assert not asked.is_poisoned
            assert found == (self._sampled.setdefault(asked.key, found) if expected is None else expected)


@pytest.mark.parametrize("seed", range(2))
def test_every_answer_is_that_of_a_single_run(load, alone, prefix_folders, tmp_path, seed):
    chance, faults = random.Random(seed), []
    for name, path in prefix_folders.items():
        shutil.copytree(path, tmp_path / "served" / name)
    model = load(dtype=torch.float32)

    def poison(module, inputs, states):
        return states.masked_fill((inputs[0] == POISON)[..., None], torch.nan)

    def fail(*_):
        if faults:
            raise faults.pop()

    model.transformer.embedding.register_forward_hook(poison)
    model.transformer.encoder.layers[1].register_forward_pre_hook(fail)
    engine = Engine(
        model,
        slots=chance.choice((1, 3, 6)),
        slot_tokens=chance.choice((61, 80, 130)),  # 40 tokens, 16 of an answer, and 5 of a prefix at most
        prefill_chunk=chance.choice((1, 4, 16, 64)),
        prefix_source=PrefixFolder(tmp_path / "served"),
        prefix_memory=chance.choice((0, 2**30)),
    )
    with engine:
        client, running, injected = Client(engine, alone, list(prefix_folders), chance), [], 0
        for _ in range(REQUESTS):
            running.append(client.ask())
            if chance.random() < 0.1:
                chance.choice(running).generation.cancel()
            if chance.random() < 0.02 and not faults:
                faults.append(Fault())
                injected += 1
            if chance.random() < 0.05:
                engine.unload_prefix(chance.choice(list(prefix_folders)))
            while len(running) > chance.choice((1, 5, 20)):
                client.check(running.pop(chance.randrange(len(running))))
        for asked in running:
            client.check(asked)
        stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert sum(stats.requests.values()) == REQUESTS
    assert injected - len(faults) == stats.restarts
    assert stats.requests["length"] + stats.requests["stop"] > REQUESTS / 2
