"""Prefixes that the engine serves: found, loaded, reloaded and removed."""

from __future__ import annotations

import shutil

import pytest
import torch
from engine_runs import SingleRuns, ids_of

from chatglm_ptuning import ChatGLMForConditionalGeneration
from chatglm_ptuning.prefix.bank import LoadedPrefix, PrefixBank
from chatglm_ptuning.prefix.formats import detect_format
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import PrefixFolder
from chatglm_ptuning.serving.engine.request import SamplingSettings, UnknownPrefix

PROMPT = [5, 17, 60, 33, 8, 21]
ANSWER = SamplingSettings(8)


@pytest.fixture
def model(load):
    return load(dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "served"


@pytest.fixture
def start(model, folder):
    engines = []

    def make(**changes) -> Engine:
        settings = {"slots": 2, "slot_tokens": 40, "prefix_source": PrefixFolder(folder)}
        engines.append(Engine(model, **settings | changes).start())
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def alone(tiny_base, prefix_folders):
    """The greedy answer to PROMPT by `generate`."""
    runs = SingleRuns(tiny_base, prefix_folders)
    return lambda name: runs(PROMPT, ANSWER.max_new_tokens, name)


def ask(engine: Engine, name: str | None) -> list[int]:
    return ids_of(engine.submit(PROMPT, ANSWER, name))


def test_a_new_prefix_is_served_without_a_restart(start, folder, prefix_folders, alone):
    engine = start()
    assert engine.prefix_names() == []
    assert ask(engine, None) == alone(None)
    shutil.copytree(prefix_folders["a"], folder / "new")
    assert engine.prefix_names() == ["new"]
    assert ask(engine, "new") == alone("a")
    shutil.rmtree(folder / "new")
    with pytest.raises(UnknownPrefix, match="new"):
        ask(engine, "new")


def test_a_changed_prefix_is_loaded_again(start, folder, prefix_folders, alone):
    engine = start()
    shutil.copytree(prefix_folders["a"], folder / "it")
    first = ask(engine, "it")
    assert first == alone("a") == ask(engine, "it")
    shutil.copytree(prefix_folders["b"], folder / "it", dirs_exist_ok=True)
    generation = engine.submit(PROMPT, ANSWER, "it")
    assert ids_of(generation) == alone("b") != first
    assert generation.cached_tokens == 0  # nothing is shared with the earlier values


def test_loading_again_reads_the_files(start, folder, prefix_folders):
    """Also where their sizes and times do not show a change."""
    shutil.copytree(prefix_folders["a"], folder / "it")
    engine = start()
    ask(engine, "it")
    engine.load_prefix("it")
    generation = engine.submit(PROMPT, ANSWER, "it")
    assert len(ids_of(generation)) == 8 and generation.cached_tokens == 0


def test_training_runs_are_prefixes_and_other_things_are_not(start, folder, prefix_folders, alone):
    engine = start()
    for number, name in ((9, "a"), (10, "b")):
        shutil.copytree(prefix_folders[name], folder / "run" / f"checkpoint-{number}")
    shutil.copytree(prefix_folders["a"], folder / ".hidden")
    shutil.copytree(prefix_folders["a"], folder / "deep" / "within")
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("x")
    (folder / "link").symlink_to(prefix_folders["a"])
    assert engine.prefix_names() == ["link", "run"]
    assert ask(engine, "run") == alone("b")
    shutil.copytree(prefix_folders["a"], folder / "run" / "checkpoint-11")
    assert ask(engine, "run") == alone("a")
    for name in (".hidden", "deep", "deep/within", "run/checkpoint-9", "empty", "file.txt"):
        with pytest.raises(UnknownPrefix):
            ask(engine, name)


def test_links_that_lead_nowhere_are_no_prefixes(start, folder, prefix_folders, alone):
    shutil.copytree(prefix_folders["a"], folder / "a")
    for name, target in (("round", "round"), ("gone", "nowhere"), ("a/link.bin", "nowhere")):
        (folder / name).symlink_to(target)
    engine = start()
    assert engine.prefix_names() == ["a"]
    assert ask(engine, "a") == alone("a")
    shutil.copytree(prefix_folders["b"], folder / "a", dirs_exist_ok=True)
    assert ask(engine, "a") == alone("b")
    for name in ("round", "gone"):
        with pytest.raises(UnknownPrefix, match=name):
            ask(engine, name)


def test_a_prefix_removed_while_it_is_looked_up_is_unknown(start, folder, prefix_folders, monkeypatch):
    shutil.copytree(prefix_folders["a"], folder / "a")
    engine = start()

    def removed(path):
        found = detect_format(path)
        shutil.rmtree(path)
        return found

    monkeypatch.setattr("chatglm_ptuning.serving.engine.prefixes.detect_format", removed)
    with pytest.raises(UnknownPrefix, match="'a'"):
        ask(engine, "a")


def test_entries_of_one_prefix_are_never_shared_with_other_values(start, folder, prefix_folders, alone, monkeypatch):
    """The files change after they were looked at, and before they are loaded."""
    shutil.copytree(prefix_folders["a"], folder / "it")
    engine = start()
    assert ask(engine, "it") == alone("a")
    engine.unload_prefix("it")
    find = PrefixFolder.find

    def changed(self, name):
        found = find(self, name)
        shutil.copytree(prefix_folders["b"], folder / "it", dirs_exist_ok=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(PrefixFolder, "find", changed)
        assert ask(engine, "it") == alone("b")
    assert ask(engine, "it") == alone("b")


def test_a_prefix_that_cannot_be_loaded_is_refused_and_logged(start, folder, prefix_folders, alone, tiny_base, caplog):
    engine = start()
    shutil.copytree(prefix_folders["a"], folder / "broken")
    weights = folder / "broken" / "prefix_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    untrained = ChatGLMForConditionalGeneration.from_pretrained(tiny_base, pre_seq_len=3)
    untrained.save_prefix(folder / "untrained")
    for name, reason in (("broken", "prefix_model.safetensors"), ("untrained", "untrained")):
        caplog.clear()
        with pytest.raises(UnknownPrefix, match=name):
            ask(engine, name)
        assert reason in caplog.text
    shutil.copy(prefix_folders["a"] / weights.name, weights)
    assert ask(engine, "broken") == alone("a")


def test_prefixes_are_kept_within_the_bound(start, folder, prefix_folders, alone):
    size = 2 * 2 * 2 * 8 * 4  # bytes of a virtual token: layers, keys and values, groups, channels, float32
    for number in range(6):
        shutil.copytree(prefix_folders["b"], folder / str(number))
    shutil.copytree(prefix_folders["a"], folder / "a")
    engine = start(prefix_memory=11 * size)  # two of length 5
    expected = alone("b")
    generations = [engine.submit(PROMPT, ANSWER, str(number % 6)) for number in range(12)]
    assert all(ids_of(generation) == expected for generation in generations)
    stats = engine.stats()
    assert (stats.prefixes_loaded, stats.prefix_bytes, stats.prefix_evictions) == (2, 10 * size, 10)
    assert ask(engine, "5") == expected  # used again: "4" is now the oldest
    assert ask(engine, "a") == alone("a")
    assert ask(engine, "5") == expected
    assert engine.stats().prefix_evictions == 11


def test_the_bank_counts_copies_and_keeps_the_one_in_use():
    bank = PrefixBank(torch.float32, memory=1000)
    for name in "xyz":
        bank.add(name, LoadedPrefix(torch.randn(2, 4, 1, 8), {}))  # 256 bytes
    assert bank.names == ["x", "y", "z"]
    bank.key_values("x", torch.device("cpu"), torch.float32)
    assert bank.memory_used == 768  # no copy is needed
    bank.key_values("y", torch.device("cpu"), torch.float64)  # 512 bytes more
    assert bank.names == ["y"]
    assert bank.memory_used == 768
    bank.add("large", LoadedPrefix(torch.randn(20, 4, 1, 8), {}))
    assert bank.names == ["large"]
    assert bank.evictions == 3


def test_the_bank_keeps_the_dtype_of_the_base(tiny_base, folder, prefix_folders):
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_base, dtype=torch.bfloat16)
    shutil.copytree(prefix_folders["b"], folder / "b")
    with Engine(model, slots=2, slot_tokens=40, prefix_source=PrefixFolder(folder)) as engine:
        assert len(ask(engine, "b")) == 8
        assert engine.stats().prefix_bytes == 5 * 2 * 2 * 2 * 8 * 2
