"""Instructions made from plain documents, and from labelled rows, for the pre-training of a small base.

Every kind has several phrasings, with the instruction before or behind the text, so that what the model learns is to
read the instruction and not its place.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import jieba

Pair = tuple[str, str]
"""A question and its answer."""

_CLAUSE_END = re.compile(r"(?<=[，。！？；,!?;\n])")
_PRAISE = """
不错 很好 喜欢 满意 推荐 值得 精彩 感动 舒服 方便 干净 漂亮 实用 好看 优秀 很棒 太棒 完美 划算 温馨 热情 周到 清晰
给力 超值 实惠 好评 好用 惊喜 开心 细心 可爱 有趣 爱不释手 性价比高 物美价廉
"""
_BLAME = """
失望 后悔 太差 很差 垃圾 不好 难看 糟糕 难用 麻烦 太贵 无聊 浪费 不值 上当 恶劣 破旧 骗人 郁闷 差劲 太吵 不满 难受 一般
差评 不行 无语 气愤 投诉 不爽 没用 太慢 恶心 冷淡 可惜 遗憾 不喜欢 不满意 不值得 不推荐 不舒服 不方便 不实用
不干净 没意思
"""
_PRAISE_WORDS = frozenset(_PRAISE.split())
# The longest first, so that a word with its negation is found before the word alone.
_JUDGEMENT = re.compile("|".join(sorted([*_PRAISE_WORDS, *_BLAME.split()], key=len, reverse=True)))
_NEGATED = re.compile(r"(不|没|没有|无|别|谁|哪|怎么|非)(很|太|是|让人|能|会|敢|觉得|够|那么|再|想|要)?$")
_NEGATION_REACH = 5


def clauses(text: str) -> list[str]:
    """The text cut behind its punctuation marks."""
    return [clause for clause in _CLAUSE_END.split(text) if clause.strip()]


def judgements(text: str) -> list[re.Match[str]]:
    """Words of praise or blame in a text, without those whose sense a word before them turns round."""
    found = _JUDGEMENT.finditer(text)
    return [m for m in found if not _NEGATED.search(text, max(0, m.start() - _NEGATION_REACH), m.start())]


def _ask(rng: random.Random, phrasings: list[str], text: str) -> str:
    instruction = rng.choice(phrasings)
    return rng.choice((f"{instruction}\n{text}", f"{text}\n{instruction}", f"{instruction}：{text}"))


def continue_text(text: str, rng: random.Random, other: str) -> Pair | None:
    """The beginning of a text; the answer is the rest."""
    parts = clauses(text)
    if len(parts) < 2:
        return None
    cut = rng.randint(1, len(parts) - 1)
    return _ask(rng, ["请接着写下去", "续写这段话", "后面会怎么说"], "".join(parts[:cut])), "".join(parts[cut:])


def fill_in(text: str, rng: random.Random, other: str) -> Pair | None:
    """A text with a word left out; the answer is the word."""
    words = jieba.lcut(text)
    places = [place for place, word in enumerate(words) if len(word) > 1 and word.strip()]
    if not places:
        return None
    place = rng.choice(places)
    blanked = "".join(words[:place]) + "____" + "".join(words[place + 1 :])
    return _ask(rng, ["请填空", "空格里应该是什么词", "把缺少的词补上"], blanked), words[place]


def opinion(text: str, rng: random.Random, other: str) -> Pair | None:
    """A review without the clause that holds its judgement; the answer is that judgement, as a word or a clause."""
    parts = clauses(text)
    found = [(place, match.group()) for place, part in enumerate(parts) for match in judgements(part)[:1]]
    if not found or len(parts) < 2:
        return None
    place, word = rng.choice(found)
    rest = "".join(parts[:place] + parts[place + 1 :])
    if rng.random() < 0.7:
        return _ask(
            rng, ["作者觉得怎么样？用一个词回答", "用一个词评价", "写这段话的人是什么态度", "总体感受如何"], rest
        ), word
    return _ask(rng, ["用一句话总结作者的看法", "作者会怎么评价", "补上一句评价"], rest), parts[place]


def blank_opinion(text: str, rng: random.Random, other: str) -> Pair | None:
    """A review with its words of judgement left out; the answer is the first of them."""
    found = judgements(text)
    if not found:
        return None
    blanked, end = "", 0
    for match in found:
        blanked += text[end : match.start()] + "____"
        end = match.end()
    return _ask(rng, ["请填上表示评价的词", "空格里是什么评价", "填空"], blanked + text[end:]), found[0].group()


def praise_or_blame(text: str, rng: random.Random, other: str) -> Pair | None:
    """Which of two words fits a review whose words of judgement all point one way; often without the first of them."""
    found = judgements(text)
    praised = {match.group() in _PRAISE_WORDS for match in found}
    if len(praised) != 1:
        return None
    if rng.random() < 0.5:
        text = text[: found[0].start()] + text[found[0].end() :]
    pair = rng.choice(
        (("喜欢", "不喜欢"), ("夸奖", "抱怨"), ("正面", "负面"), ("值得买", "不值得买"), ("高兴", "生气"))
    )
    first, second = rng.sample(pair, 2)
    question = rng.choice((f"{first}还是{second}？", f"选一个：{first}，{second}", f"作者的态度是{first}还是{second}"))
    return _ask(rng, [question], text), pair[0 if praised.pop() else 1]


def first_or_last(text: str, rng: random.Random, other: str) -> Pair | None:
    """Copying one clause out of a text."""
    parts = clauses(text)
    if len(parts) < 2:
        return None
    if rng.random() < 0.5:
        return _ask(rng, ["这段话的第一句是什么", "抄写开头的一句"], text), parts[0]
    return _ask(rng, ["这段话的最后一句是什么", "抄写结尾的一句"], text), parts[-1]


def contains(text: str, rng: random.Random, other: str) -> Pair | None:
    """Whether a word is in a text; half of the words are taken from another text."""
    words = [word for word in jieba.lcut(text if rng.random() < 0.5 else other) if len(word) > 1 and word.strip()]
    if not words:
        return None
    word = rng.choice(words)
    question = rng.choice((f"下面的话里有没有“{word}”", f"文中出现“{word}”了吗", f"“{word}”在不在这段话里"))
    return _ask(rng, [question], text), "有" if word in text else "没有"


def same_text(text: str, rng: random.Random, other: str) -> Pair | None:
    """Whether two pieces are of the same text."""
    parts = clauses(text)
    if len(parts) < 2:
        return None
    cut = rng.randint(1, len(parts) - 1)
    first, second = "".join(parts[:cut]), "".join(parts[cut:])
    same = rng.random() < 0.5
    pair = f"一：{first}\n二：{second if same else other}"
    return _ask(
        rng, ["这两段话是连着的吗", "两段话出自同一处吗", "第二段能接在第一段后面吗"], pair
    ), "是" if same else "不是"


def keywords(text: str, rng: random.Random, other: str) -> Pair | None:
    """A headline with its keywords on the next line, as news data sets have it."""
    title, _, words = text.partition("\n")
    if not words or "\n" in words or "," not in words:
        return None
    return _ask(rng, ["列出关键词", "这条新闻的关键词是什么", "提取关键词"], title), words.replace(",", "，")


Kinds = list[tuple[Callable[[str, random.Random, str], Pair | None], float]]

KINDS: Kinds = [
    (continue_text, 1.0), (fill_in, 1.5), (first_or_last, 0.5), (keywords, 1.0), (contains, 0.5), (same_text, 0.7),
]  # fmt: skip
"""Every kind with how often it is tried."""
KINDS_OF_JUDGEMENT: Kinds = [*KINDS, (opinion, 6.0), (blank_opinion, 2.0), (praise_or_blame, 2.0)]
"""The same for texts that hold a judgement."""

_TRIES = 4


def make(text: str, other: str, rng: random.Random) -> Pair | None:
    """One instruction about a text, of a random kind among those that the text allows; None if none was found.

    Args:
        other: another text, for the kinds that compare.
    """
    kinds, weights = zip(*(KINDS_OF_JUDGEMENT if judgements(text) else KINDS), strict=True)
    for _ in range(_TRIES):
        pair = rng.choices(kinds, weights)[0](text, rng, other)
        if pair is not None:
            return pair
    return None


def labelled(rows: dict[str, list[dict]], rng: random.Random) -> list[Pair]:
    """Instructions from the training rows of FewCLUE tasks, those that the kit does not score itself on.

    Args:
        rows: task name -> rows in the benchmark's own fields.
    """
    pairs = []
    for row in rows.get("iflytek", []):
        pairs.append((_ask(rng, ["这是哪一类应用", "判断应用的类别"], row["sentence"][:150]), row["label_des"]))
    for row in rows.get("csldcp", []):
        pairs.append((_ask(rng, ["这篇文章属于哪个学科", "判断学科"], row["content"][:150]), row["label"]))
    for row in rows.get("ocnli", []):
        answer = {"entailment": "对", "contradiction": "不对", "neutral": "不一定"}.get(row["label"])
        if answer:
            pairs.append((f"{row['sentence1']}\n那么“{row['sentence2']}”，对吗？", answer))
    for row in rows.get("bustm", []):
        question = f"一：{row['sentence1']}\n二：{row['sentence2']}"
        pairs.append((_ask(rng, ["两句话意思一样吗"], question), "一样" if row["label"] == "1" else "不一样"))
    for row in rows.get("chid", []):
        text = row["content"].replace("#idiom#", "____")
        question = f"{text}\n可选的成语：{'，'.join(row['candidates'])}"
        pairs.append((_ask(rng, ["选一个成语填空"], question), row["candidates"][row["answer"]]))
    for row in rows.get("csl", []):
        if row["label"] == "1":
            pairs.append((_ask(rng, ["列出论文的关键词"], row["abst"][:150]), "，".join(row["keyword"])))
    return pairs
