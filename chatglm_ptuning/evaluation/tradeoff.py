"""`chatglm-ptuning tradeoff`: the task's score against the distance from the base, over runs of `--preserve_base`.

Runs of the same weight (other seeds) are drawn as their mean with its deviation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.evaluation.figures import new_figure, save_figure
from chatglm_ptuning.files import write_atomically
from chatglm_ptuning.metrics.spread import mean_and_deviation
from chatglm_ptuning.prefix.fingerprint import difference
from chatglm_ptuning.prefix.formats.kit import METADATA_FILE

RESULTS_FILE = "all_results.json"
_METRICS = ("accuracy", "micro_f1", "macro_f1", "entity_f1", "cmrc_f1", "exact_match", "rouge-l")
_SCORES = (*(f"{split}_{name}" for split in ("predict", "eval") for name in _METRICS), "eval_mean", "eval_loss")
"""What is drawn if nothing is named and the task is not of the registry: the first that all runs have."""
_DRIFT = ("preserve_base", "general_kl", "general_perplexity", "general_perplexity_base")


@dataclass
class TradeoffArguments:
    """Flags of `tradeoff`."""

    runs: list[str] = field(init=False)
    output: str = field(default="tradeoff.png", metadata={"help": "picture to write; the numbers go into .json beside"})
    score: str | None = field(
        default=None,
        metadata={
            "help": f"which number of {RESULTS_FILE} (default: the task's own metric, else the first of "
            f"{', '.join(_SCORES)})"
        },
    )

    def __post_init__(self) -> None:
        if Path(self.output).suffix.lower() != ".png":
            raise ValueError(f"--output must end in .png, got {self.output!r}")


@dataclass(frozen=True)
class TradeoffPoint:
    """One run.

    Attributes:
        preserve_base: the weight it was trained with.
        score: of the task.
        general_kl: KL(base || tuned), nats per token of held-out general rows.
        general_perplexity: of those rows with the prefix; general_perplexity_base: without.
    """

    run: str
    preserve_base: float
    score: float
    general_kl: float
    general_perplexity: float
    general_perplexity_base: float


def read_points(runs: Sequence[str], score: str | None = None) -> tuple[str, list[TradeoffPoint]]:
    """The name of the score, and a point for every run, by weight.

    Args:
        runs: folders of `chatglm-ptuning train`.
        score: as in `all_results.json`; None for the task's own metric, or the first of the usual ones that all runs
            have.

    Raises:
        ValueError: naming every run that lacks a number, and what it lacks; or runs of different tasks, heads or bases.
    """
    results = {run: _read(Path(run), RESULTS_FILE) for run in runs}
    told = {run: _read(Path(run), METADATA_FILE) for run in runs}
    faults = _differences(told)
    faults += [
        f"{run} has no {', '.join(missing)}: train it with --report_drift true"
        for run, found in results.items()
        if (missing := [name for name in _DRIFT if not _is_number(found.get(name))])
    ]
    if score is None:
        usual = (*_own_scores(next(iter(told.values()))), *_SCORES)
        shared = [name for name in usual if all(_is_number(found.get(name)) for found in results.values())]
        if not shared:
            faults.append(
                f"the runs have none of {', '.join(usual)} in common: train them with --do_eval or --do_predict, or "
                "name another number by --score"
            )
        score = shared[0] if shared else ""
    else:
        for run, found in results.items():
            if not _is_number(found.get(score)):
                others = ", ".join(sorted(name for name, value in found.items() if _is_number(value)))
                faults.append(f"{run} has no {score} (it has {others})")
    if faults:
        raise ValueError("; ".join(faults) + ".")
    points = [TradeoffPoint(run, score=found[score], **{name: found[name] for name in _DRIFT})
              for run, found in results.items()]  # fmt: skip
    return score, sorted(points, key=lambda point: (point.preserve_base, point.run))


def _differences(told: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What makes runs incomparable: each against the first."""
    (first, one), *others = told.items()
    faults = []
    for run, other in others:
        # What runs on files call their task is the name of a file.
        names = ("task", "head") if one.get("head") or other.get("head") else ()
        found = [f"{name} {one.get(name)} and {other.get(name)}" for name in names if one.get(name) != other.get(name)]
        fingerprints = one.get("base_fingerprint"), other.get("base_fingerprint")
        if all(fingerprints) and (what := difference(*fingerprints)):
            found.append(f"their base ({what})")
        faults += [f"{first} and {run} differ in {name}: draw them apart" for name in found]
    return faults


def _own_scores(told: Mapping[str, Any]) -> tuple[str, ...]:
    """The numbers that hold the task's own metric; none if its task is not of the registry."""
    try:
        metric = load_task(told.get("task") or "").metric
    except ValueError:
        return ()
    return f"predict_{metric}", f"eval_{metric}"


@dataclass(frozen=True)
class TradeoffMean:
    """All runs of one weight: means, and standard deviations (n - 1), which are 0 for one run."""

    preserve_base: float
    runs: int
    score: float
    score_deviation: float
    general_kl: float
    general_kl_deviation: float
    general_perplexity: float
    general_perplexity_deviation: float


def mean_of_each_weight(points: Sequence[TradeoffPoint]) -> list[TradeoffMean]:
    """What the runs of every weight have in common, by weight; several are the same training with other seeds."""
    by_weight: dict[float, list[TradeoffPoint]] = {}
    for point in points:
        by_weight.setdefault(point.preserve_base, []).append(point)
    means = []
    for weight, of_weight in sorted(by_weight.items()):
        numbers: dict[str, float] = {}
        for name in ("score", "general_kl", "general_perplexity"):
            mean, deviation = mean_and_deviation(getattr(point, name) for point in of_weight)
            numbers |= {name: mean, f"{name}_deviation": deviation or 0.0}
        means.append(TradeoffMean(weight, len(of_weight), **numbers))
    return means


def draw_tradeoff(path: Path, score: str, points: Sequence[TradeoffPoint]) -> None:
    """Writes a PNG: score against KL, the mean of every weight labelled by it, and the runs where they are several."""
    means = mean_of_each_weight(points)
    figure, axes = new_figure(7, 4.5)
    if len(means) < len(points):
        axes.plot([point.general_kl for point in points], [point.score for point in points], ".", color="#b0b8c0")
    axes.errorbar(
        [mean.general_kl for mean in means],
        [mean.score for mean in means],
        xerr=[mean.general_kl_deviation for mean in means],
        yerr=[mean.score_deviation for mean in means],
        fmt="o-",
        capsize=3,
        elinewidth=0.8,
        color="#4878a8",
    )
    for mean in means:
        axes.annotate(
            f"W = {mean.preserve_base:g}",
            (mean.general_kl, mean.score),
            textcoords="offset points",
            xytext=(6, 6),
        )
    axes.set(xlabel="KL(base || tuned) on held-out general rows (nats per token)", ylabel=score)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


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
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_tradeoff(output, score, points)
        with write_atomically(output.with_suffix(".json")) as temporary:
            means = mean_of_each_weight(points)
            content = {"score": score, "means": list(map(asdict, means)), "points": list(map(asdict, points))}
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except (ValueError, OSError) as error:
        fail(str(error))
    print(f"{'W':>6} {score:>20} {'KL':>8} {'perplexity':>11}  (base {points[0].general_perplexity_base:.2f})")
    for point in points:
        weight, value = f"{point.preserve_base:g}", f"{point.score:.4g}"
        print(f"{weight:>6} {value:>20} {point.general_kl:>8.4f} {point.general_perplexity:>11.2f}  {point.run}")
    for mean in means:
        if mean.runs > 1:
            print(
                f"W {mean.preserve_base:g}, {mean.runs} runs: {score} {mean.score:.4g} ± {mean.score_deviation:.2g}, "
                f"KL {mean.general_kl:.4f} ± {mean.general_kl_deviation:.4f}, "
                f"perplexity {mean.general_perplexity:.2f} ± {mean.general_perplexity_deviation:.2f}"
            )
    print(f"Written: {output}, {output.with_suffix('.json')}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(run: Path, name: str) -> dict[str, Any]:
    path = run / name
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run} is no finished run: it has no {name}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(found).__name__}.")
    return found
