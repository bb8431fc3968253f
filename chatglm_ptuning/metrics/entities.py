"""Entity F1 of BIO tags by seqeval, the table of entity types, and CLUENER2020's own score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from statistics import fmean

Tags = Sequence[Sequence[str]]
"""BIO tags of several sentences."""


@dataclass(frozen=True)
class EntityScore:
    """Scores of one entity type, in percent; `support` is how many are expected."""

    precision: float
    recall: float
    f1: float
    support: int


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities of BIO tags as (type, first, last), both inclusive; an `I-` without a `B-` begins one, like seqeval."""
    spans: list[tuple[str, int, int]] = []
    for place, tag in enumerate(tags):
        side, _, entity = tag.partition("-")
        if side == "O":
            continue
        if side == "I" and spans and spans[-1][0] == entity and spans[-1][2] == place - 1:
            spans[-1] = (entity, spans[-1][1], place)
        else:
            spans.append((entity, place, place))
    return spans


def entity_scores(predicted: Tags, expected: Tags) -> tuple[dict[str, float], dict[str, EntityScore]]:
    """Micro-averaged `entity_precision`, `entity_recall` and `entity_f1` in percent, and the scores of every type.

    An entity counts as found if its type and both its ends are right. Computed by seqeval in its default mode, that of
    the conlleval script, in which an `I-` without its `B-` begins an entity.

    Raises:
        ValueError: if the sentences differ in number or length.
    """
    _check(predicted, expected)
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    gold, found = [list(tags) for tags in expected], [list(tags) for tags in predicted]
    types = sorted({entity for tags in (*gold, *found) for entity, _, _ in spans_of(tags)})
    if not types:
        return dict.fromkeys(("entity_precision", "entity_recall", "entity_f1"), 0.0), {}
    micro = precision_recall_fscore_support(gold, found, average="micro", zero_division=0)
    each = precision_recall_fscore_support(gold, found, average=None, zero_division=0)
    table = {
        entity: EntityScore(*(100 * float(values[place]) for values in each[:3]), int(each[3][place]))
        for place, entity in enumerate(types)
    }
    names = ("entity_precision", "entity_recall", "entity_f1")
    return {name: 100 * float(value) for name, value in zip(names, micro[:3], strict=True)}, table


def entities_of(text: str, tags: Sequence[str]) -> frozenset[tuple[str, str]]:
    """Type and text of every entity of BIO tags of characters."""
    return frozenset((entity, text[first : last + 1]) for entity, first, last in spans_of(tags))


def cluener_f1(
    predicted: Sequence[Set[tuple[str, str]]], expected: Sequence[Set[tuple[str, str]]], types: Sequence[str]
) -> float:
    """CLUENER2020's score in percent: the mean over the types of F1, where a sentence's entities of a type are the set
    of their texts (score.py of CLUENER2020). A type that is neither expected nor predicted counts 0.

    Args:
        predicted: type and text of each sentence's entities; `expected` likewise, as the file has them: where one
            stands inside another, tags lose it.

    Raises:
        ValueError: if the sentences differ in number.
    """
    hits, found, gold = Counter[str](), Counter[str](), Counter[str]()
    for left, right in zip(predicted, expected, strict=True):
        found.update(entity for entity, _ in left)
        gold.update(entity for entity, _ in right)
        hits.update(entity for entity, _ in left & right)
    return 100 * fmean(2 * hits[entity] / max(found[entity] + gold[entity], 1) for entity in types)


def _check(predicted: Tags, expected: Tags) -> None:
    if not expected or len(predicted) != len(expected):
        raise ValueError(f"There are predicted tags of {len(predicted)} sentences, and {len(expected)} expected.")
    for index, (found, gold) in enumerate(zip(predicted, expected, strict=True)):
        if len(found) != len(gold):
            raise ValueError(
                f"Sentence {index} (counted from 0) has {len(found)} predicted tags, {len(gold)} expected."
            )
