"""Rows in the cache: their content, when they are encoded again, and what killed or concurrent processes leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizer
from instruction_rows import conversation_head, training_rows
from json_lines import write_rows

from chatglm_ptuning.data.cache import ROWS_FILE, TokenCache, open_rows
from chatglm_ptuning.data.dataset import Loader, Split, lengths_of, mixture, shared_rows
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.sources.files import iterate_rows

DETECT = Columns()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: tiny_tokenizer.train(folder, name) for name in ("chatglm2", "chatglm3")}


@pytest.fixture
def encoder(tokenizers):
    def make(chat_format="chatglm3", source=40, target=20, prefix="", columns=DETECT):
        return conversation_head(tokenizers[chat_format], source, target, prefix, columns)

    return make


def prepare(names, head, cache, *, weights=None, max_rows=None, **how):
    loader = Loader(cache, progress=False, **how)
    return loader.rows(head, Split(names, limit=max_rows, weights=weights))


@pytest.fixture
def cache(tmp_path):
    return TokenCache(tmp_path / "cache")


def data_file(folder: Path, *rows: dict | str, name: str = "rows.json") -> str:
    return str(write_rows(folder / name, *rows))


def pair(number: int) -> dict:
    return {"prompt": "甲" * (number % 30 + 1), "response": "乙" * (number % 9)}


def entries(cache: TokenCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def answers(examples) -> list[int]:
    """The number of 乙 in every answer, which identifies the row."""
    return [sum(label >= 0 for label in example["labels"]) - 4 for example in examples]


@pytest.mark.parametrize("workers", [1, 2])
def test_examples_are_those_of_the_encoder(tmp_path, encoder, cache, workers):
    conversation = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]
    path = data_file(tmp_path, *map(pair, range(60)), {"messages": conversation * 2}, {"text": "丙" * 150})
    expected, report = training_rows(encoder().tokenizer, iterate_rows([path]), 40, 20)
    data = prepare([path], encoder(), cache, num_workers=workers)
    assert [{name: row[name] for name in ("input_ids", "labels")} for row in data.rows] == expected
    assert data.report == report
    assert lengths_of(data.rows) == lengths_of(expected) == [len(example["input_ids"]) for example in expected]
    assert not data.reused


def test_cached_rows_are_reused_until_something_changes(tmp_path, encoder, cache):
    path = data_file(tmp_path, *map(pair, range(5)))
    first = prepare([path], encoder(), cache)
    (entry,) = entries(cache)
    made = (entry / ROWS_FILE).stat().st_ino
    again = prepare([path], encoder(), TokenCache(cache.folder))
    assert again.reused and again.report == first.report and again.rows[:] == first.rows[:]
    assert (entry / ROWS_FILE).stat().st_ino == made
    changed = [
        encoder("chatglm2"), encoder(source=39), encoder(target=19), encoder(prefix="问"),
        encoder(columns=Columns("response", "prompt")), encoder(columns=Columns(dataset_format="columns")),
    ]  # fmt: skip
    for count, other in enumerate(changed, start=2):
        assert not prepare([path], other, cache).reused
        assert len(entries(cache)) == count
    assert not prepare([path], encoder(), cache, max_rows=3).reused
    Path(path).write_text(Path(path).read_text("utf-8") + json.dumps(pair(8)), "utf-8")
    grown = prepare([path], encoder(), cache)
    assert not grown.reused and grown.report.rows == 6
    assert len(entries(cache)) == len(changed) + 3
    overwriting = TokenCache(cache.folder, overwrite=True)
    assert not prepare([path], encoder(), overwriting).reused
    assert prepare([path], encoder(), overwriting).reused
    assert len(entries(cache)) == len(changed) + 3


def test_every_file_of_a_folder_has_its_own_entry(tmp_path, encoder, cache):
    folder = tmp_path / "shards"
    folder.mkdir()
    data_file(folder, pair(1), pair(2), name="a.json")
    data_file(folder, {"instruction": "甲", "output": "乙乙乙"}, name="b.json")
    data = prepare([str(folder)], encoder(), cache)
    assert answers(data.rows) == [1, 2, 3] and data.report.rows == 3
    assert len(entries(cache)) == 2
    assert answers(prepare([str(folder)], encoder(), cache, max_rows=1).rows) == [1]
    empty = data_file(tmp_path, {"prompt": "", "response": ""}, name="empty.json")
    data = prepare([empty, str(folder)], encoder(), cache, weights=[1, 2])
    assert answers(data.rows) == [1, 1, 2, 2, 3, 3] and data.report.empty == 1


def test_mixing_by_weight(tmp_path, encoder, cache):
    one = data_file(tmp_path, *map(pair, (1, 2)), name="one.json")
    two = data_file(tmp_path, *map(pair, (3, 4, 5, 6)), name="two.json")

    def mixed(weights, seed=1):
        return answers(prepare([one, two], encoder(), cache, weights=weights, seed=seed).rows)

    assert mixed([1, 1]) == mixed(None) == [1, 2, 3, 4, 5, 6]
    assert mixed([3, 1]) == [1, 1, 1, 2, 2, 2, 3, 4, 5, 6]
    half = mixed([1, 0.5])
    assert half == mixed([1, 0.5]) and half[:2] == [1, 2] and len(half) == 4 and set(half[2:]) < {3, 4, 5, 6}
    assert len({tuple(mixed([1, 0.5], seed)) for seed in range(8)}) > 1
    for weights, message in [
        ([1], "1 numbers .*2 files"),
        ([1, 0], "must be positive"),
        ([1, -1], "must be positive"),
    ]:
        with pytest.raises(ValueError, match=f"train_weights .*{message}"):
            mixed(weights)


def test_a_mixture_depends_on_the_seed_alone():
    chosen = mixture([10, 4], [2.3, 0.5], seed=7)
    assert chosen.tolist() == mixture([10, 4], [2.3, 0.5], seed=7).tolist()
    counts = np.bincount(chosen, minlength=14)
    assert sorted(counts[:10].tolist()) == [2] * 7 + [3] * 3 and sorted(counts[10:].tolist()) == [0, 0, 1, 1]
    # A longer file beside it changes nothing of the choice.
    assert mixture([10, 400], [2.3, 0.5], seed=7)[:23].tolist() == chosen[:23].tolist()


def test_bad_rows_raise_or_are_skipped_and_counted(tmp_path, encoder, cache):
    tool = {"messages": [{"role": "user", "content": "甲"}, {"role": "observation", "content": "乙"},
                         {"role": "assistant", "content": "丙"}]}  # fmt: skip
    path = data_file(tmp_path, pair(1), "{broken", {"甲": 1}, tool, pair(2))
    with pytest.raises(ValueError, match=rf"^{path}:2: not valid JSON"):
        prepare([path], encoder("chatglm2"), cache)
    assert entries(cache) == [] and not list(cache.folder.glob(".*"))
    data = prepare([path], encoder("chatglm2"), cache, skip_bad_rows=3)
    assert (data.report.rows, data.report.used, data.report.bad) == (5, 2, 3)
    assert data.warnings[0].startswith(f"3 bad rows were skipped, the first:\n{path}:2: not valid JSON")
    again = prepare([path], encoder("chatglm2"), cache, skip_bad_rows=3)
    assert again.reused and again.warnings == data.warnings
    with pytest.raises(ValueError, match=r"More than 2 bad rows"):
        prepare([path], encoder("chatglm2"), cache, skip_bad_rows=2)
    with pytest.raises(ValueError, match=rf"^{path}:2: not valid JSON"):
        prepare([path], encoder("chatglm2"), cache)


def test_warnings_and_rows_in_both_sets(tmp_path, encoder, cache):
    train = data_file(tmp_path, pair(1), pair(2), pair(1), {"prompt": "[gMASK]", "response": "乙"}, name="train.json")
    dev = data_file(tmp_path, pair(2), pair(3), name="dev.json")
    data = prepare([train], encoder(), cache)
    assert data.warnings == [
        f"1 rows that repeat an earlier row word for word: {train}:3",
        f"1 rows that spell special tokens (they are learned as ordinary text): {train}:4",
    ]
    noted = data_file(tmp_path, pair(4), {**pair(5), "备注": "注"}, name="noted.json")
    for _ in range(2):  # newly encoded, and from the cache
        (warning,) = prepare([noted], encoder(), cache).warnings
        assert "1 rows whose field '备注'" in warning and f"{noted}:2" in warning
    other = prepare([dev], encoder(), cache)
    assert shared_rows(data.rows, other.rows) == 1
    with pytest.raises(ValueError, match="No row of the data can be used:\n1 rows, 0 used"):
        prepare([data_file(tmp_path, {"prompt": "", "response": ""}, name="no.json")], encoder(), cache)


def fill(folder: Path) -> dict:
    (folder / ROWS_FILE).write_text("whole")
    return {}


def run_all(targets: list) -> list[int]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_a_process_that_is_killed_leaves_nothing_half_written(cache):
    def die(folder: Path) -> None:
        (folder / ROWS_FILE).write_text("half")
        os.kill(os.getpid(), 9)

    assert run_all([lambda: cache.entry({"a": 1}, die)]) == [-9]
    assert entries(cache) == [] and len(list(cache.folder.glob(".*"))) == 1
    entry, was_there = cache.entry({"a": 1}, fill)
    assert not was_there and (entry / ROWS_FILE).read_text() == "whole"
    assert not list(cache.folder.glob(".*"))


def test_one_of_several_processes_makes_an_entry_and_the_others_wait(cache, tmp_path):
    log = tmp_path / "log"

    def make(folder: Path) -> dict:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)
        return fill(folder)

    def want() -> None:
        entry, _ = cache.entry({"a": 1}, make)
        assert (entry / ROWS_FILE).read_text() == "whole"

    assert run_all([want] * 4) == [0] * 4
    assert log.read_text() == "made\n"


def test_a_damaged_entry_is_made_again(tmp_path, encoder, cache):
    path = data_file(tmp_path, *map(pair, range(1, 6)))
    prepare([path], encoder(), cache)
    (entry,) = entries(cache)
    examples = entry / ROWS_FILE
    os.truncate(examples, examples.stat().st_size - 1)
    assert not prepare([path], encoder(), cache).reused
    assert len(open_rows(entry)) == 5 and prepare([path], encoder(), cache).reused


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path, encoder):
    path = data_file(tmp_path, pair(1))
    with pytest.raises(OSError, match=r"rows.json .*written: .*data_cache_dir"):
        prepare([path], encoder(), TokenCache(path))


# Pages of memory-mapped files are not counted: the system takes them back when it needs them.
PEAK = """
import sys, threading, time
from pathlib import Path
import tiny_tokenizer
from instruction_rows import conversation_head
from chatglm_ptuning.data.dataset import Loader, Split
from chatglm_ptuning.data.cache import TokenCache

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text().partition("RssAnon:")[2]
        peak = max(peak, int(status.split()[0]) // 1024)
        time.sleep(0.02)

small, big, folder = sys.argv[1:]
peak = 0
threading.Thread(target=watch, daemon=True).start()
tokenizer = tiny_tokenizer.train(Path(folder), "chatglm3")
head = conversation_head(tokenizer, 1000, 1000)
peaks = []
for path in (small, big):
    data = Loader(TokenCache(Path(folder) / "cache"), progress=False).rows(head, Split([path]))
    sum(data.rows[index]["length"] for index in range(0, len(data.rows), 100))
    peaks.append(peak)
print(len(data.rows), *peaks)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux gives it")
@pytest.mark.parametrize("opening", ["", "["])
def test_memory_does_not_grow_with_the_file(tmp_path, opening):
    paths = {}
    for name, count in (("small.json", 1000), ("big.json", 100_000)):
        paths[name] = tmp_path / name
        with paths[name].open("w", encoding="utf-8") as file:
            file.write(opening)
            for number in range(count):
                row = {"prompt": f"{number}今天天气很好" * 20, "response": f"我想去公园散步{number}" * 30}
                comma = "," if opening and number else ""
                file.write(comma + json.dumps(row, ensure_ascii=False) + "\n")
            file.write("]" if opening else "")
    command = [sys.executable, "-c", PEAK, *map(str, paths.values()), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    examples, small, big = map(int, done.stdout.split())
    assert examples == 100_000
    # The file has more than 100 MB, its examples 10 times that; as Python lists they would take 10 GB.
    assert big - small < 120, (small, big)
