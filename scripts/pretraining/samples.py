"""From a corpus to samples of token ids on disk, and from samples to packed rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from chatglm_ptuning.chat.chatglm3 import ChatGLM3Roles
from chatglm_ptuning.chat.message import Message
from chatglm_ptuning.files import read_json_object, write_json
from chatglm_ptuning.model.vocabulary import SentencePieceVocabulary
from pretraining import instructions
from pretraining.corpus import Corpus

EOS_ID = 2
FACTS_FILE = "samples.json"
_CHUNK = 2000  # documents that a worker encodes at a time
_INSTRUCTION_CHARACTERS = 150
_PACKING_CHUNK = 8192  # samples that are packed together


def train_vocabulary(texts: Iterable[str], path: Path, size: int) -> None:
    """Trains a byte-pair vocabulary with byte fallback and without normalisation."""
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentencepiece_length=8,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=1,
    )
    path.with_suffix(".vocab").unlink()


class SampleEncoder:
    """Encodes texts and conversations as samples of at most `row_length` ids."""

    def __init__(self, vocabulary: SentencePieceVocabulary, row_length: int) -> None:
        self.vocabulary = vocabulary
        self.row_length = row_length
        self.chat = ChatGLM3Roles(vocabulary)
        self.start = self.chat.start_ids
        self.newline = vocabulary.encode("\n")

    def document(self, text: str) -> list[list[int]]:
        """`[gMASK] sop text </s>`, cut into several samples of which only the last ends in `</s>` if it is long."""
        ids = [*self.vocabulary.encode(text), EOS_ID]
        room = self.row_length - len(self.start)
        return [[*self.start, *ids[place : place + room]] for place in range(0, len(ids), room)]

    def conversation(self, messages: list[dict[str, str]]) -> list[list[int]]:
        """ChatGLM3's roles, ended by `</s>`; without the turns that do not fit, and nothing if not one fits."""
        ids = list(self.start)
        answered: list[int] = []
        for message in messages:
            ids += self.chat.encode_message(Message.from_dict(message))
            if message["role"] == "assistant":
                if len(ids) + 1 > self.row_length:
                    break
                answered = list(ids)
        return [[*answered, EOS_ID]] if answered else []

    def echo(self, text: str) -> list[list[int]]:
        """The text twice, a newline between, shortened until it fits a row: what repeats is predicted from before."""
        room = (self.row_length - len(self.start) - len(self.newline) - 1) // 2
        ids = self.vocabulary.encode(text)[:room]
        return [[*self.start, *ids, *self.newline, *ids, EOS_ID]]


def _pair(pair: instructions.Pair) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


@dataclass(frozen=True)
class _Work:
    """A part of the corpus for one worker process."""

    kind: str
    items: list
    vocabulary: Path
    row_length: int
    variants: int
    seed: int

    def run(self) -> tuple[str, np.ndarray, np.ndarray]:
        """Returns the kind, all ids one behind the other, and the samples' lengths."""
        encoder = SampleEncoder(SentencePieceVocabulary(self.vocabulary), self.row_length)
        samples = [sample for item in self._instructed() for sample in getattr(encoder, self._form)(item)]
        ids = np.fromiter((index for sample in samples for index in sample), dtype=np.uint16)
        return self.kind, ids, np.array([len(sample) for sample in samples], dtype=np.uint32)

    @property
    def _form(self) -> str:
        return {"documents": "document", "echo": "echo"}.get(self.kind, "conversation")

    def _instructed(self) -> Iterator:
        if self.kind != "made instructions":
            yield from self.items
            return
        rng = random.Random(self.seed)
        for _ in range(self.variants):
            for text in self.items:
                start = rng.randrange(max(1, len(text) - _INSTRUCTION_CHARACTERS + 1))
                text = text[start : start + _INSTRUCTION_CHARACTERS]
                other = rng.choice(self.items)[: len(text)]
                pair = instructions.make(text, other, rng)
                if pair is not None:
                    yield _pair(pair)


def write_samples(
    corpus: Corpus, vocabulary: Path, folder: Path, row_length: int, variants: int, echo_share: float, seed: int
) -> None:
    """Encodes the corpus into `folder`: `ids.npy`, `lengths.npy`, and `samples.json` with settings and counts by kind.

    Args:
        variants: how often the program tries to make an instruction of each document.
        echo_share: share of the documents that are also written twice into one sample.
    """
    rng = random.Random(seed)
    instructed = [text for text in corpus.documents if text not in corpus.plain]
    kinds = {
        "documents": corpus.documents,
        "made instructions": instructed,
        "labelled": [_pair(pair) for _ in range(variants) for pair in instructions.labelled(corpus.labelled, rng)],
        "conversations": corpus.conversations,
        "echo": rng.sample(corpus.documents, round(echo_share * len(corpus.documents))),
    }
    work = [
        _Work(kind, items[place : place + _CHUNK], vocabulary, row_length, variants, seed + place)
        for kind, items in kinds.items()
        for place in range(0, len(items), _CHUNK)
    ]
    parts = []
    with ProcessPoolExecutor(min(16, cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        parts += tqdm(pool.map(_Work.run, work), total=len(work), desc="encoding", unit="part")
    counts: dict[str, Counter] = {}
    for kind, ids, lengths in parts:
        counts.setdefault(kind, Counter()).update(samples=len(lengths), tokens=len(ids))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ids.npy", np.concatenate([ids for _, ids, _ in parts]))
    np.save(folder / "lengths.npy", np.concatenate([lengths for _, _, lengths in parts]))
    settings = {"row_length": row_length, "variants": variants, "echo_share": echo_share, "seed": seed}
    write_json(folder / FACTS_FILE, {"settings": settings, "counts": counts})  # last: it makes the folder complete


def check_samples(folder: Path, **settings: float) -> bool:
    """Whether the samples are there already.

    Raises:
        ValueError: naming both sides, if they were encoded with other settings.
    """
    path = folder / FACTS_FILE
    if not path.exists():
        return False
    before = read_json_object(path)["settings"]
    other = [f"{name} {before[name]}, not {value}" for name, value in settings.items() if before[name] != value]
    if other:
        raise ValueError(f"The samples in {folder} were encoded with {'; '.join(other)}. Name another --output.")
    return True


def pack(lengths: np.ndarray, row_length: int, rng: np.random.Generator) -> list[list[int]]:
    """Puts samples together into rows of at most `row_length` ids, by best fit, without cutting any.

    Samples are shuffled, then packed a few thousand at a time, the longest first, each into the row with the least
    room that still has enough (Ding et al. 2024, "Fewer truncations improve language modeling").

    Returns:
        The indices of each row's samples; rows and their samples are in random order.
    """
    packed: list[list[int]] = []
    order = rng.permutation(len(lengths))
    for chunk in np.array_split(order, -(-len(order) // _PACKING_CHUNK)):
        rows: list[list[int]] = []
        by_room: dict[int, list[list[int]]] = {}
        rooms = 0  # bit n is set while a row with room for n ids is open
        for sample in chunk[np.argsort(-lengths[chunk], kind="stable")].tolist():
            length = int(lengths[sample])
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = by_room[room].pop()
                if not by_room[room]:
                    rooms &= ~(1 << room)
            else:
                room, row = row_length, []
                rows.append(row)
            row.append(sample)
            by_room.setdefault(room - length, []).append(row)
            rooms |= 1 << (room - length)
        packed += rows
    order_of_rows = random.Random(int(rng.integers(2**32)))
    order_of_rows.shuffle(packed)
    for row in packed:
        order_of_rows.shuffle(row)
    return packed


class PackedRows:
    """Endless packed rows of the samples in a folder, in an order that depends on the seed and the epoch alone."""

    def __init__(self, folder: Path, row_length: int, seed: int) -> None:
        self.ids = np.load(folder / "ids.npy", mmap_mode="r")
        self.lengths = np.load(folder / "lengths.npy").astype(np.int64)
        self.starts = np.concatenate(([0], np.cumsum(self.lengths)[:-1]))
        self.row_length = row_length
        self.seed = seed

    def batches(self, batch: int, skip: int = 0) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields the epoch (from 0), ids and positions, int64 `[batch, row_length]`.

        Positions start at 0 with every sample; padding has id 0 and position 0.

        Args:
            skip: batches to leave out at the beginning, as a resumed run does.
        """
        epoch, rows, used = 0, self._epoch(0), 0
        while True:
            while len(rows) - used < batch:
                epoch += 1
                rows, used = rows[used:] + self._epoch(epoch), 0
            taken, used = rows[used : used + batch], used + batch
            if skip:
                skip -= 1
                continue
            ids = np.zeros((batch, self.row_length), dtype=np.int64)
            positions = np.zeros_like(ids)
            for place, row in enumerate(taken):
                end = 0
                for sample in row:
                    begin, end = end, end + int(self.lengths[sample])
                    ids[place, begin:end] = self.ids[self.starts[sample] :][: end - begin]
                    positions[place, begin:end] = np.arange(end - begin)
            yield epoch, ids, positions

    def _epoch(self, epoch: int) -> list[list[int]]:
        return pack(self.lengths, self.row_length, np.random.default_rng([self.seed, epoch]))
