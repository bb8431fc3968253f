"""The results of the load test as a table, as JSON, in Markdown and as a picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.quantities import Quantity, Result
from benchmarks.serving.clients import Seen
from benchmarks.serving.mixed import ENDED, EQUAL, LEFT, REFUSED, SAMPLED, Outcome
from benchmarks.serving.server import Moment
from benchmarks.timing import Sample
from chatglm_ptuning.figures import drawing
from chatglm_ptuning.files import write_json, write_text
from chatglm_ptuning.tables import Table

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "serving.json", "serving.md", "serving.png"
_HEADINGS = ("quantity", "compared with", "under load", "the other", "ratio", "goal", "holds")
_WINDOWS = 10
_PERCENTILES = 20


def _quantity(what: str, theirs: str = "", unit: str = "", less: bool = True, digits: int = 0) -> Quantity:
    return Quantity("serving", what, theirs, unit, {}, less_is_better=less, digits=digits)


THROUGHPUT = _quantity("throughput", "one client", "tokens/s", less=False)
BATCH = _quantity("throughput", "one padded batch by generate", "tokens/s", less=False)
COMPUTED = _quantity("throughput", "this batch with the tokens after each answer's end", "tokens/s", less=False)
FIRST = _quantity("time to first token, median", "one client", "ms")
FIRST_P95 = _quantity("time to first token, 95th percentile", "one client", "ms")
MEMORY = _quantity("memory of the server, last quarter", "second quarter", "MiB")
FAILED = _quantity("requests that fail", unit="requests")
STUCK = _quantity("stuck requests", unit="requests")
LOST = _quantity("slots that are not free afterwards", unit="slots")
WRONG = _quantity("answers that differ from their single runs", unit="answers")
COMPARED = _quantity("answers equal to their single runs", unit="answers", less=False)
BROKEN = _quantity("other requests with an unexpected end", unit="requests")
AGAIN = _quantity("requests that fail afterwards", unit="requests")
RECOVERY = _quantity("from a killed worker to the next answer", unit="s", digits=2)
FAULTS = (FAILED, STUCK, LOST, WRONG, BROKEN, AGAIN)
"""Whatever the machine, there must be none."""


@dataclass(frozen=True)
class Timeline:
    """What the picture shows."""

    seen: list[Seen]
    moments: list[Moment]


@dataclass(frozen=True)
class Load:
    """The sizes of a load."""

    clients: int

    def results(
        self,
        seen: Sequence[Seen],
        alone: Sequence[Seen],
        moments: Sequence[Moment],
        batch: Sample,
        computed: Sample,
        seconds: float,
        lost: float,
    ) -> list[Result]:
        """The rows of the table.

        Args:
            seen, alone: by all clients, and by one alone.
            batch, computed: tokens/s of the padded batch: those that were asked for, and all.
            seconds: of the load.
            lost: slots in use afterwards.
        """
        shape = f"{self.clients} clients"
        throughput = tokens_per_second(seen)
        waits = [[1000 * one.waited for one in some if not one.problem] for some in (seen, alone)]
        stuck = sum(one.problem == "stuck" for one in seen)
        failed = sum(bool(one.problem) for one in seen) - stuck
        rows = [
            Result(FAILED, shape, 0, _one(failed), None),
            Result(STUCK, shape, 0, _one(stuck), None),
            Result(LOST, shape, 0, _one(lost), None),
            Result(THROUGHPUT, shape, 5, throughput, tokens_per_second(alone)),
            Result(BATCH, shape, 0.9, throughput, batch),
            Result(COMPUTED, shape, None, throughput, computed),
        ]
        if all(waits):
            rows.append(Result(FIRST, shape, 4, *(_one(statistics.median(some)) for some in waits)))
            rows.append(Result(FIRST_P95, shape, None, *(_one(_p95(some)) for some in waits)))
        quarter = len(moments) // 4
        if quarter:
            memory = [moment.memory for moment in moments]
            late, early = Sample(tuple(memory[-quarter:])), Sample(tuple(memory[quarter : 2 * quarter]))
            rows.append(Result(MEMORY, shape, 1.02, late, early))
        return rows


def _one(value: float) -> Sample:
    return Sample((float(value),))


def _p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=_PERCENTILES)[-1] if len(values) > 1 else values[0]


def tokens_per_second(seen: Sequence[Seen]) -> Sample:
    """Tokens that the clients got, in each tenth of the time that they asked, without the first tenth.

    The tokens of an answer are spread evenly from its first text to its end.
    """
    start, end = min(one.start for one in seen), max(one.start for one in seen)
    edges = [start + (end - start) * number / _WINDOWS for number in range(1, _WINDOWS + 1)]
    if end <= start:
        return _one(0)
    pairs = itertools.pairwise(edges)
    return Sample(tuple(_tokens_between(seen, *pair) / (pair[1] - pair[0]) for pair in pairs))


def _tokens_between(seen: Sequence[Seen], start: float, end: float) -> float:
    total = 0.0
    for one in seen:
        overlap = min(one.end, end) - max(one.first, start)
        if one.tokens and overlap > 0:
            total += one.tokens * overlap / max(one.end - one.first, overlap)
    return total


def of_mixed(outcome: Outcome, lost: float, after: Sequence[Seen], count: int) -> list[Result]:
    """The rows of the mixed requests."""
    shape = "mixed"
    wrong = outcome.number("different from the single run")
    fine = sum(map(outcome.number, (EQUAL, REFUSED, LEFT, SAMPLED, ENDED)))
    rows = [
        Result(COMPARED, shape, None, _one(outcome.number(EQUAL)), None),
        Result(WRONG, shape, 0, _one(wrong), None),
        Result(BROKEN, shape, 0, _one(count - fine - wrong), None),
        Result(LOST, shape, 0, _one(lost), None),
        Result(AGAIN, shape, 0, _one(sum(bool(one.problem) for one in after)), None),
    ]
    if outcome.seconds_to_answer is not None:
        rows.append(Result(RECOVERY, shape, 5, _one(outcome.seconds_to_answer), None))
    return rows


def table(results: Sequence[Result]) -> Table:
    """The results; the values of a time are the median, and the smallest and largest in brackets."""
    return Table(_HEADINGS, [row[: len(_HEADINGS)] for row in report.table(results).rows])


def write(folder: Path, results: Sequence[Result], timeline: Timeline | None, facts: dict[str, Any]) -> None:
    """Writes serving.json, serving.md, machine.json and, after a load, serving.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON_FILE, [result.as_json() for result in results])
    write_json(folder / report.MACHINE_FILE, facts)
    write_text(folder / MARKDOWN_FILE, f"{table(results).markdown()}\n\n{report.described(facts)}.\n")
    if timeline is not None and timeline.moments:
        draw(folder / PICTURE_FILE, timeline)


def draw(path: Path, timeline: Timeline) -> None:
    """Writes a PNG of throughput, times to first token and memory over time."""
    moments = timeline.moments
    start = min(one.start for one in timeline.seen)
    times = [moment.time - start for moment in moments]
    with drawing(path, 13, 3.6, columns=3) as (throughput, first, memory):
        pairs = list(itertools.pairwise(moments))
        rates = [(later.generated - earlier.generated) / (later.time - earlier.time) for earlier, later in pairs]
        throughput.plot(times[1:], rates)
        throughput.set(ylabel="tokens/s")
        answered = [one for one in timeline.seen if not one.problem]
        first.plot([one.start - start for one in answered], [1000 * one.waited for one in answered], ".", markersize=2)
        first.set(ylabel="time to first token, ms")
        memory.plot(times, [moment.memory for moment in moments])
        memory.set(ylabel="memory of the server, MiB")
        for axes in (throughput, first, memory):
            axes.set(xlabel="seconds")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
