"""`chatglm-ptuning tradeoff`: the task's score against the distance from the base, over runs of `--preserve_base`.

Runs with the same weight (different seeds) are drawn as their mean with its standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.experiments.run import RESULTS_FILE
from chatglm_ptuning.figures import Mark, draw_lines
from chatglm_ptuning.files import read_json_object, write_json
from chatglm_ptuning.metrics.intervals import mean_and_deviation
from chatglm_ptuning.prefix.fingerprint import difference
from chatglm_ptuning.prefix.formats.kit import METADATA_FILE
from chatglm_ptuning.tables import Table, spread

_METRICS = ("accuracy", "micro_f1", "macro_f1", "entity_f1", "cmrc_f1", "exact_match", "rouge-l")
_SCORES = (*(f"{split}_{name}" for split in ("predict", "eval") for name in _METRICS), "eval_mean", "eval_loss")
"""The default score of a task that is not in the registry: the first of these that all runs have."""
_DRIFT = ("preserve_base", "general_kl", "general_perplexity", "general_perplexity_base")

Point = dict[str, Any]
"""One run, or the mean of the runs of one weight: `preserve_base` (the weight), `score`, `general_kl` (KL(base ||
tuned) in nats per token of held-out general rows), `general_perplexity` of those rows; of a mean each with `_deviation`
(n - 1; 0 for one run), and the number of `runs`."""


@dataclass
class TradeoffArguments:
    """Flags of `tradeoff`."""

    runs: list[str] = field(init=False)
    output: str = field(default="tradeoff.png", metadata={"help": "picture; the numbers go to .json beside it"})
    score: str | None = field(
        default=None,
        metadata={
            "help": f"a key of {RESULTS_FILE} (default: the task's own metric, else the first of {', '.join(_SCORES)})"
        },
    )

    def __post_init__(self) -> None:
        if Path(self.output).suffix.lower() != ".png":
            raise ValueError(f"--output must end in .png, got {self.output!r}")


def read_points(runs: Sequence[str], score: str | None = None) -> tuple[str, list[Point]]:
    """The name of the score, and a point for every run, by weight.

    Args:
        runs: folders of `chatglm-ptuning train`.
        score: a key of `all_results.json`; None for the task's own metric, or the first usual one that all runs have.

    Raises:
        ValueError: naming every run that lacks a number, and the number; or runs of different tasks, heads or bases.
    """
    results = {run: _read(Path(run), RESULTS_FILE) for run in runs}
    metadata = {run: _read(Path(run), METADATA_FILE) for run in runs}
    faults = _differences(metadata)
    faults += [
        f"{run} has no {', '.join(missing)}: train it with --report_drift true"
        for run, found in results.items()
        if (missing := [name for name in _DRIFT if not _is_number(found.get(name))])
    ]
    usual = (*_own_scores(next(iter(metadata.values()))), *_SCORES)
    shared = [name for name in usual if all(_is_number(found.get(name)) for found in results.values())]
    if score is None and not shared:
        faults.append(
            f"the runs have none of {', '.join(usual)} in common: train them with --do_eval or --do_predict, or name "
            "another number by --score"
        )
    score = score or next(iter(shared), "")
    for run, found in results.items():
        if score and not _is_number(found.get(score)):
            others = ", ".join(sorted(name for name, value in found.items() if _is_number(value)))
            faults.append(f"{run} has no {score} (it has {others})")
    if faults:
        raise ValueError("; ".join(faults) + ".")
    points = [
        {"run": run, "score": found[score], **{name: found[name] for name in _DRIFT}} for run, found in results.items()
    ]
    return score, sorted(points, key=lambda point: (point["preserve_base"], point["run"]))


def _differences(metadata: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What makes runs incomparable: each against the first."""
    (first, one), *others = metadata.items()
    faults = []
    for run, other in others:
        # The task of a run on instruction files is named after the file, which may differ.
        names = ("task", "head") if one.get("head") or other.get("head") else ()
        found = [f"{name} {one.get(name)} and {other.get(name)}" for name in names if one.get(name) != other.get(name)]
        fingerprints = one.get("base_fingerprint"), other.get("base_fingerprint")
        if all(fingerprints) and (what := difference(*fingerprints)):
            found.append(f"their base ({what})")
        faults += [f"{first} and {run} differ in {name}: draw them apart" for name in found]
    return faults


def _own_scores(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the task's own metric; none if its task is not in the registry."""
    try:
        metric = load_task(metadata.get("task") or "").metric
    except ValueError:
        return ()
    return f"predict_{metric}", f"eval_{metric}"


def mean_of_each_weight(points: Sequence[Point]) -> list[Point]:
    """The means of the runs of every weight, by weight."""
    means = []
    for weight in sorted({point["preserve_base"] for point in points}):
        of_weight = [point for point in points if point["preserve_base"] == weight]
        mean: Point = {"preserve_base": weight, "runs": len(of_weight)}
        for name in ("score", "general_kl", "general_perplexity"):
            mean[name], deviation = mean_and_deviation(point[name] for point in of_weight)
            mean[f"{name}_deviation"] = deviation or 0.0
        means.append(mean)
    return means


def _draw(path: Path, score: str, points: Sequence[Point], means: Sequence[Point]) -> None:
    marks = [
        Mark(mean["general_kl"], mean["score"], mean["score_deviation"], mean["general_kl_deviation"],
             f"W = {mean['preserve_base']:g}")
        for mean in means
    ]  # fmt: skip
    dots = [(point["general_kl"], point["score"]) for point in points] if len(means) < len(points) else []
    draw_lines(path, {"": marks}, "KL(base || tuned) on held-out general rows (nats per token)", score, dots=dots)


def main(argv: Sequence[str]) -> None:
    """Entry of the command; runs that lack the numbers end it with a message and exit code 1."""
    (arguments,) = parse_arguments(
        "chatglm-ptuning tradeoff",
        "Draw the task's score against the distance from the base, for runs with different --preserve_base.",
        (TradeoffArguments,),
        argv,
        positional="runs",
    )
    output = Path(arguments.output)
    try:
        score, points = read_points(arguments.runs, arguments.score)
        means = mean_of_each_weight(points)
        output.parent.mkdir(parents=True, exist_ok=True)
        _draw(output, score, points, means)
        write_json(output.with_suffix(".json"), {"score": score, "means": means, "points": points})
    except (ValueError, OSError) as error:
        fail(str(error))
    rows = [
        [point["run"], f"{point['preserve_base']:g}", f"{point['score']:.4g}", f"{point['general_kl']:.4f}",
         f"{point['general_perplexity']:.2f}"]
        for point in points
    ]  # fmt: skip
    Table(["run", "W", score, "KL", f"perplexity (base {points[0]['general_perplexity_base']:.2f})"], rows).show()
    for mean in means:
        if mean["runs"] > 1:
            print(
                f"W {mean['preserve_base']:g}, {mean['runs']} runs: "
                f"{score} {spread(mean['score'], mean['score_deviation'], '.4g', '.2g')}, "
                f"KL {spread(mean['general_kl'], mean['general_kl_deviation'], '.4f', '.4f')}, "
                f"perplexity {spread(mean['general_perplexity'], mean['general_perplexity_deviation'])}"
            )
    print(f"Written: {output}, {output.with_suffix('.json')}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(run: Path, name: str) -> dict[str, Any]:
    if not (run / name).is_file():
        raise ValueError(f"{run} is no finished run: it has no {name}.")
    return read_json_object(run / name)
