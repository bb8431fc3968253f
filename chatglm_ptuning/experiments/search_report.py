"""What a search leaves for people: tables, pictures, and the commands that repeat its best setting."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ptuning.experiments.report import Table, spread
from chatglm_ptuning.experiments.search_arguments import SearchArguments
from chatglm_ptuning.figures import Mark, draw_lines
from chatglm_ptuning.files import write_json, write_text
from chatglm_ptuning.metrics.intervals import mean_and_deviation

REPORT_FILE = "search.json"

Row = Mapping[str, Any]
"""What `Trial.row` tells of a trial."""


def write_report(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[Row], args: SearchArguments, common: Sequence[str]
) -> dict[str, Any]:
    """Writes what is known by now into the folder:

    - `search.json`: what the search goes by, every trial with its course, the tables below;
    - `search.md`: trials, the best of each length, and how fast each kind of first values learns;
    - `score_by_length.png`, and where there are several, `score_by_learning_rate.png` and `course_by_init.png`;
    - `best_command.sh`: the commands of `train` that repeat the best setting, one for each seed.

    Args:
        settings: that must be the same where the search is resumed.
        common: flags of `train` that all trials share.

    Returns:
        The content of `search.json`.
    """
    lower_is_better = settings["metric"] == "loss"
    whole = sorted((row for row in rows if "mean" in row), key=lambda row: row["mean"], reverse=not lower_is_better)
    report: dict[str, Any] = {
        "settings": settings,
        "best": whole[0] if whole else None,
        "commands": _commands(whole[0], args, common) if whole else [],
        "by_length": list(_best(whole, "prefix_projection", "pre_seq_len").values()),
        "by_init": _courses_by_init(whole),
        "trials": rows,
    }
    write_json(folder / REPORT_FILE, report)
    write_text(folder / "search.md", "\n\n".join(_markdown(report)) + "\n")
    if whole:
        write_text(folder / "best_command.sh", "\n".join(["#!/bin/sh", *report["commands"], ""]))
        _draw(report, whole, folder)
    return report


def print_report(report: Mapping[str, Any], folder: Path) -> None:
    """Prints the best of each length, the best of all, and how to repeat it."""
    best = report["best"]
    if best:
        _table("The best setting of each length", report["by_length"], report["settings"]["metric"]).show()
        print(f"The best is trial {best['number']}. To repeat it:\n\n{report['commands'][0]}")
    print(f"\nAll trials are in {folder / 'search.md'}{', pictures beside it' if best else ''}.")


def _outcome(row: Row) -> str:
    if "mean" in row:
        return spread(row["mean"], row["deviation"], ".4g", ".2g")
    if row["state"] == "pruned":
        step, score, _ = next(iter(row["seeds"].values()))["points"][-1]
        return f"stopped at step {step} with {score:.4g}"
    return f"failed: {row['error']}" if "error" in row else row["state"]


def _best(whole: Sequence[Row], *names: str) -> dict[tuple[Any, ...], Row]:
    """The best trial for each combination of values of some settings, `whole` being sorted by quality."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in whole:
        best.setdefault(tuple(row["setting"][name] for name in names), row)
    return dict(sorted(best.items()))


def _courses_by_init(whole: Sequence[Row]) -> dict[str, Any]:
    """Mean score and loss at every evaluation for each kind of first values, over settings that all of them finished.

    `steps_to_loss` is the evaluation at which each first had the loss that the slowest of them ended with.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for row in whole:
        setting = dict(row["setting"])
        start = setting.pop("prefix_init")
        groups.setdefault(tuple(setting.values()), {})[start] = [seed["points"] for seed in row["seeds"].values()]
    starts = sorted({row["setting"]["prefix_init"] for row in whole})
    shared = [group for group in groups.values() if len(group) == len(starts)]
    if len(starts) < 2 or not shared:
        return {}
    courses = {start: _mean_course([points for group in shared for points in group[start]]) for start in starts}
    target = max(course[-1]["loss"] for course in courses.values())
    reached = {
        start: next(point["step"] for point in course if point["loss"] <= target) for start, course in courses.items()
    }
    return {"settings": len(shared), "courses": courses, "loss": target, "steps_to_loss": reached}


def _mean_course(runs: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    course = []
    for at in zip(*runs, strict=True):
        steps, scores, losses = zip(*at, strict=True)
        (score, score_deviation), (loss, loss_deviation) = mean_and_deviation(scores), mean_and_deviation(losses)
        course.append(
            {
                "step": steps[0],
                "score": score,
                "score_deviation": score_deviation,
                "loss": loss,
                "loss_deviation": loss_deviation,
            }
        )
    return course


def _commands(best: Row, args: SearchArguments, common: Sequence[str]) -> list[str]:
    commands = []
    for seed in args.seeds:
        words = [*args.train_arguments(common, best["setting"], seed), "--output_dir", f"output/best-{seed}"]
        commands.append(shlex.join(["python", "-m", "chatglm_ptuning", "train", *words]))
    return commands


def _table(title: str, rows: Sequence[Row], metric: str) -> Table:
    settings = [name.removeprefix("prefix_") for name in rows[0]["setting"]]
    headings = ["trial", *settings, metric, "seconds"]
    cells = [
        [str(row["number"]), *map(str, row["setting"].values()), _outcome(row), f"{row['seconds']:g}"] for row in rows
    ]
    return Table(headings, cells, title)


def _markdown(report: Mapping[str, Any]) -> list[str]:
    settings, metric = report["settings"], report["settings"]["metric"]
    seeds = ", ".join(map(str, settings["seeds"]))
    several = f" and standard deviation over the seeds {seeds}" if len(settings["seeds"]) > 1 else ""
    parts = [
        "# Search",
        f"`{settings['flags of train']}`, {settings['max_steps']} steps; {metric} on the dev split, mean{several}.",
    ]
    if report["by_length"]:
        parts.append(_table("The best setting of each length", report["by_length"], metric).markdown())
    if report["by_init"]:
        parts += _init_parts(report["by_init"], metric)
    if report["trials"]:
        parts.append(_table("All trials", report["trials"], metric).markdown())
    if report["commands"]:
        parts += ["## The best again", "```bash\n" + "\n".join(report["commands"]) + "\n```"]
    return parts


def _init_parts(by_init: Mapping[str, Any], metric: str) -> list[str]:
    steps = [point["step"] for point in next(iter(by_init["courses"].values()))]
    rows = [
        [start, *(f"{point['score']:.4g} ({point['loss']:.3f})" for point in course),
         str(by_init["steps_to_loss"][start])]
        for start, course in by_init["courses"].items()
    ]  # fmt: skip
    headings = ["prefix_init", *(f"step {step}" for step in steps), f"steps to a loss of {by_init['loss']:.3f}"]
    return [
        Table(headings, rows, "First values").markdown(),
        f"{metric} and, in brackets, loss (nats) on the dev split; means over the {by_init['settings']} "
        "settings that all of them finished, and the seeds.",
    ]


def _draw(report: Mapping[str, Any], whole: Sequence[Row], folder: Path) -> None:
    metric = report["settings"]["metric"]
    by_length: dict[str, list[Mark]] = {}
    for (projection, length), row in _best(whole, "prefix_projection", "pre_seq_len").items():
        name = "with projection" if projection else "without projection"
        by_length.setdefault(name, []).append(Mark(length, row["mean"], row["deviation"]))
    x_label = "pre_seq_len (best learning rate of each)"
    draw_lines(folder / "score_by_length.png", by_length, x_label, metric, log_base=2)
    by_rate: dict[str, list[Mark]] = {}
    for (length, rate), row in _best(whole, "pre_seq_len", "learning_rate").items():
        by_rate.setdefault(f"pre_seq_len {length}", []).append(Mark(rate, row["mean"], row["deviation"]))
    if len({row["setting"]["learning_rate"] for row in whole}) > 1:
        draw_lines(folder / "score_by_learning_rate.png", by_rate, "learning_rate", metric, log_base=10)
    if report["by_init"]:
        courses = {
            start: [Mark(point["step"], point["loss"], point["loss_deviation"]) for point in course]
            for start, course in report["by_init"]["courses"].items()
        }
        draw_lines(folder / "course_by_init.png", courses, "step", "loss on the dev split (nats)")
