"""Questions and answers about passages of a document, from templates in Chinese and English.

The templates are for small bases, which write poor questions themselves. Every round draws other ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_CLAUSE = re.compile(r"[^，,；;：。！？!?\n]+")
_NUMBER = re.compile(r"[\d零〇一二两三四五六七八九十百千万亿]+(?:[.点][\d零〇一二三四五六七八九]+)?")
_SUBJECT = re.compile(r"(.{2,14}?)(是|叫|有|在|由)(.{2,})")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_ASKED = {"是": "{}是什么？", "叫": "{}叫什么？", "有": "{}有什么？", "在": "{}在哪里？", "由": "{}由谁？"}
_BLANK = "____"


class _Texts(NamedTuple):
    """Templates of one language."""

    continued: Sequence[str]
    about: Sequence[str]
    filled: Sequence[str]
    followed: Sequence[str]
    asks: Sequence[str]
    seeds: Sequence[str]


_TEXTS = {
    "zh": _Texts(
        ("{}", "请接着写：{}", "请把这句话写完：{}"),
        ("文中关于“{}”是怎么说的？", "请说说{}。", "{}怎么样？", "请介绍一下{}。"),
        ("请填空：{}", "请把句子补充完整：{}"),
        ("“{}”的下一句是什么？", "请接着写：{}"),
        ("请就下面这句话提一个问题：{}", "请根据这段话写一个问题：{}"),
        ("请总结上面的内容。", "请列出上面内容的要点。", "根据上面的内容，请举一个例子。", "上面的内容有什么用？"),
    ),
    "en": _Texts(
        ("{}", "Continue: {}", "Finish this sentence: {}"),
        ('What does the text say about "{}"?', "Tell me about {}.", "What about {}?"),
        ("Fill in the blank: {}", "Complete the sentence: {}"),
        ('What comes after "{}"?', "Continue: {}"),
        ("Ask a question about this sentence: {}", "Write a question that this answers: {}"),
        ("Summarise the text above.", "List the main points of the text above.", "What is the text above useful for?"),
    ),
}


def templated(passages: Sequence[str], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Questions with answers that are in the document, several about each passage.

    Args:
        passages: consecutive sentences.
    """
    for place, passage in enumerate(passages):
        texts = _TEXTS[_language(passage)]
        clauses = [found.strip() for found in _CLAUSE.findall(passage) if found.strip()]
        if not clauses:
            continue
        cut = _cut(passage, draw)
        if cut is not None:
            yield draw.choice(texts.continued).format(passage[:cut].rstrip()), passage[cut:].lstrip()
        clause = draw.choice(clauses)
        answer = draw.choice((passage, clause + _end(passage)))
        yield draw.choice(texts.about).format(_phrase(clause, draw)), answer
        hidden = _phrase(clause, draw)
        yield draw.choice(texts.filled).format(clause.replace(hidden, _BLANK, 1)), clause + _end(passage)
        if place + 1 < len(passages):
            yield draw.choice(texts.followed).format(passage), passages[place + 1]
        if texts is _TEXTS["zh"]:
            yield from _asked_in_chinese(clauses, draw)


def questions_to_write(passages: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Prompts by which the base writes questions about passages, `count` about each."""
    return [draw.choice(_TEXTS[_language(passage)].asks).format(passage) for passage in passages for _ in range(count)]


def seeds(passages: Sequence[str]) -> Sequence[str]:
    """Broad prompts about the whole document, which the base answers itself."""
    return _TEXTS[_language("".join(passages))].seeds


def _asked_in_chinese(clauses: Sequence[str], draw: random.Random) -> Iterator[tuple[str, str]]:
    with_number = [clause for clause in clauses if _NUMBER.search(clause)]
    if with_number:
        clause = draw.choice(with_number)
        found = draw.choice(list(_NUMBER.finditer(clause)))
        question = clause[: found.start()] + draw.choice(("多少", "几")) + clause[found.end() :]
        yield question + "？", clause + "。"
    with_subject = [(clause, found) for clause in clauses if (found := _SUBJECT.match(clause))]
    if with_subject:
        clause, found = draw.choice(with_subject)
        asked = clause[: found.start(2)]
        if found[2] == "由":
            yield f"{asked}由谁{found[3]}？", clause + "。"
        else:
            yield _ASKED[found[2]].format(asked), clause + "。"


def _language(text: str) -> str:
    return "zh" if _CHINESE.search(text) else "en"


def _end(passage: str) -> str:
    return "。" if _language(passage) == "zh" else "."


def _cut(passage: str, draw: random.Random) -> int | None:
    """A place inside a passage, in English between words; None if it is too short."""
    if _language(passage) == "zh":
        places = list(range(2, len(passage) - 2))
    else:
        places = [found.start() for found in re.finditer(r"(?<=\S)\s+(?=\S)", passage)]
    return draw.choice(places) if places else None


def _phrase(clause: str, draw: random.Random) -> str:
    """Some consecutive characters of a clause, or words in English."""
    if _language(clause) == "zh":
        length = min(len(clause), draw.randint(2, 7))
        begin = draw.randint(0, len(clause) - length)
        return clause[begin : begin + length].strip() or clause
    words = clause.split()
    length = min(len(words), draw.randint(1, 4))
    begin = draw.randint(0, len(words) - length)
    return " ".join(words[begin : begin + length])
