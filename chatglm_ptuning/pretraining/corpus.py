"""From documents to rows of tokens for the pre-training of a small base."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatglm_ptuning.model.vocabulary import SentencePieceVocabulary
from chatglm_ptuning.pretraining import instructions

EOS_ID = 2
_LABELLED_TASKS = ("iflytek", "csldcp", "ocnli", "bustm", "chid", "csl")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, instructions with labels, and documents held out.

    Attributes:
        plain: documents that no instruction is made from.
    """

    documents: list[str]
    plain: frozenset[str]
    labelled: dict[str, list[dict]]
    held_out: list[str]


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON lines file, gzip or plain."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_corpus(corpus_dir: Path, fewclue_dir: Path, held_out_documents: int = 1000) -> Corpus:
    """Reads the documents without any text of a development or test split.

    The texts of the reviews' training split stay among them, without labels and as plain text only: the table in the
    card of chatglm-nano is made with that split.

    Args:
        corpus_dir: with `zh_documents`, `reviews_{train,dev,test}`, `peoples_daily_ner_{dev,test}`, each `.jsonl.gz`.
        fewclue_dir: one folder per FewCLUE task.
    """
    excluded = {
        row["text"] for split in ("dev", "test") for row in read_jsonl(corpus_dir / f"reviews_{split}.jsonl.gz")
    }
    for split in ("dev", "test"):
        rows = read_jsonl(corpus_dir / f"peoples_daily_ner_{split}.jsonl.gz")
        excluded |= {"".join(row["tokens"]) for row in rows}
    for path in sorted(fewclue_dir.glob("*/dev_*.json")):
        excluded |= {row.get("sentence") or row.get("content") or "" for row in read_jsonl(path)}
    documents = [row["text"] for row in read_jsonl(corpus_dir / "zh_documents.jsonl.gz")]
    # The newspaper's documents are longer than the sentences of its splits, hence the search inside them.
    sentences = sorted((text for text in excluded if len(text) >= 12), key=len)
    starts: dict[str, list[str]] = {}
    for sentence in sentences:
        starts.setdefault(sentence[:12], []).append(sentence)

    def is_clean(text: str) -> bool:
        if text in excluded:
            return False
        windows = (text[place : place + 12] for place in range(len(text) - 11))
        return not any(sentence in text for window in windows for sentence in starts.get(window, ()))

    documents = sorted({text for text in documents if is_clean(text)})
    random.Random(0).shuffle(documents)
    labelled = {task: read_jsonl(fewclue_dir / task / "train_few_all.json") for task in _LABELLED_TASKS}
    plain = frozenset(row["text"] for row in read_jsonl(corpus_dir / "reviews_train.jsonl.gz"))
    return Corpus(documents[held_out_documents:], plain, labelled, documents[:held_out_documents])


def encode_document(vocabulary: SentencePieceVocabulary, text: str) -> list[int]:
    """`[gMASK] sop text </s>`."""
    start = [vocabulary.special_ids["[gMASK]"], vocabulary.special_ids["sop"]]
    return [*start, *vocabulary.encode(text), EOS_ID]


def encode_pair(vocabulary: SentencePieceVocabulary, pair: instructions.Pair) -> list[int]:
    """A question and its answer in ChatGLM3's chat form, ending in `</s>`."""
    special, line = vocabulary.special_ids, vocabulary.encode("\n")
    question, answer = pair
    return [
        special["[gMASK]"], special["sop"],
        special["<|user|>"], *line, *vocabulary.encode(question),
        special["<|assistant|>"], *line, *vocabulary.encode(answer), EOS_ID,
    ]  # fmt: skip


def samples(
    corpus: Corpus, vocabulary: SentencePieceVocabulary, seed: int, max_characters: int, instruction_share: float
) -> Iterator[list[int]]:
    """One epoch after another, for ever: each document cut to a window, and instructions made from its text."""
    rng = random.Random(seed)
    while True:
        work = [("document", text) for text in corpus.documents]
        work += [("pair", pair) for pair in instructions.labelled(corpus.labelled, rng)]
        rng.shuffle(work)
        for kind, content in work:
            if kind == "pair":
                yield encode_pair(vocabulary, content)
                continue
            start = rng.randrange(max(1, len(content) - max_characters + 1))
            text = content[start : start + max_characters]
            if content not in corpus.plain and rng.random() < instruction_share:
                other = rng.choice(corpus.documents)[: len(text)]
                pair = instructions.make(text, other, rng)
                if pair is not None:
                    yield encode_pair(vocabulary, pair)
                    continue
            yield encode_document(vocabulary, text)


def pack(stream: Iterator[list[int]], row_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `row_length` ids, and their positions, which start at 0 with every sample.

    A sample that does not fit a row's rest goes on in the next row if enough of it fits, else the next row starts
    with it and the rest is padding (id 0, position 0).
    """
    ids: list[int] = []
    positions: list[int] = []
    for sample in stream:
        sample = sample[:row_length]
        if len(ids) + len(sample) > row_length:
            padding = row_length - len(ids)
            yield np.array(ids + [0] * padding), np.array(positions + [0] * padding)
            ids, positions = [], []
        ids += sample
        positions += range(len(sample))
