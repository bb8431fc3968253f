"""Entities of BIO tags."""

from __future__ import annotations

from collections.abc import Sequence


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities as (type, first, last), both inclusive; an `I-` without a `B-` begins one, as in seqeval."""
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


def entities_of(text: str, tags: Sequence[str]) -> frozenset[tuple[str, str]]:
    """Type and text of every entity; one tag per character."""
    return frozenset((entity, text[first : last + 1]) for entity, first, last in spans_of(tags))
