"""The report of a search: tables, pictures, and the commands that repeat its best setting."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ptuning.experiments.search_arguments import SearchArguments
from chatglm_ptuning.figures import Mark, draw_lines
from chatglm_ptuning.files import write_json, write_text
from chatglm_ptuning.metrics.intervals import mean_and_deviation
from chatglm_ptuning.tables import Table, spread

REPORT_FILE = "search.json"

Row = Mapping[str, Any]
"""A trial, see `Trial.row`."""


def write_report(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[Row], args: SearchArguments, common: Sequence[str]
) -> dict[str, Any]:
    """Writes the results so far into the folder:

    - `search.json`: the settings of the search, every trial with its evaluations, the tables below;
    - `search.md`: trials, the best of each length, and how fast each `prefix_init` learns;
    - `score_by_length.png`, and if several values were tried, `score_by_learning_rate.png` and `course_by_init.png`;
    - `best_command.sh`: the commands of `train` that repeat the best setting, one for each seed.

    Args:
        settings: that must be the same when the search is resumed.
        common: flags of `train` that all trials share.

    Returns:
        The content of `search.json`.
    """
    lower_is_better = settings["metric"] == "loss"
    finished = sorted((row for row in rows if "mean" in row), key=lambda row: row["mean"], reverse=not lower_is_better)
    report: dict[str, Any] = {
        "settings": settings,
        "best": finished[0] if finished else None,
        "commands": _commands(finished[0], args, common) if finished else [],
        "by_length": list(_best(finished, "prefix_projection", "pre_seq_len").values()),
        "by_init": _learning_curves(finished),
        "trials": rows,
    }
    write_json(folder / REPORT_FILE, report)
    write_text(folder / "search.md", "\n\n".join(_markdown(report)) + "\n")
    if finished:
        write_text(folder / "best_command.sh", "\n".join(["#!/bin/sh", *report["commands"], ""]))
        _draw(report, finished, folder)
    return report


def print_report(report: Mapping[str, Any], folder: Path) -> None:
    """Prints the best setting of each length, and the command that repeats the best of all."""
    best = report["best"]
    if best:
        _table("The best setting of each length", report["by_length"], report["settings"]["metric"]).show()
        print(f"The best is trial {best['number']}. The command that repeats it:\n\n{report['commands'][0]}")
    print(f"\nAll trials are in {folder / 'search.md'}{', pictures beside it' if best else ''}.")


def _outcome(row: Row) -> str:
    if "mean" in row:
        return spread(row["mean"], row["deviation"], ".4g", ".2g")
    if row["state"] == "pruned":
        step, score, _ = next(iter(row["seeds"].values()))["points"][-1]
        return f"stopped at step {step} with {score:.4g}"
    return f"failed: {row['error']}" if "error" in row else row["state"]


def _best(finished: Sequence[Row], *names: str) -> dict[tuple[Any, ...], Row]:
    """The best trial for each combination of some settings; `finished` is sorted, best first."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in finished:
        best.setdefault(tuple(row["setting"][name] for name in names), row)
    return dict(sorted(best.items()))


def _learning_curves(finished: Sequence[Row]) -> dict[str, Any]:
    """Mean score and loss at every evaluation for each `prefix_init`, over the settings that all of them finished.

    `steps_to_loss` is the step at which each first reaches the loss that the slowest of them ends with.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for row in finished:
        setting = dict(row["setting"])
        init = setting.pop("prefix_init")
        groups.setdefault(tuple(setting.values()), {})[init] = [seed["points"] for seed in row["seeds"].values()]
    inits = sorted({row["setting"]["prefix_init"] for row in finished})
    shared = [group for group in groups.values() if len(group) == len(inits)]
    if len(inits) < 2 or not shared:
        return {}
    courses = {init: _mean_curve([points for group in shared for points in group[init]]) for init in inits}
    target = max(course[-1]["loss"] for course in courses.values())
    reached = {
        init: next(point["step"] for point in course if point["loss"] <= target) for init, course in courses.items()
    }
    return {"settings": len(shared), "courses": courses, "loss": target, "steps_to_loss": reached}


def _mean_curve(runs: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    curve = []
    for evaluations in zip(*runs, strict=True):
        steps, *numbers = zip(*evaluations, strict=True)
        point = {"step": steps[0]}
        for name, values in zip(("score", "loss"), numbers, strict=True):
            point[name], point[f"{name}_deviation"] = mean_and_deviation(values)
        curve.append(point)
    return curve


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
    settings, metric, by_init = report["settings"], report["settings"]["metric"], report["by_init"]
    seeds = ", ".join(map(str, settings["seeds"]))
    several = f" and standard deviation over the seeds {seeds}" if len(settings["seeds"]) > 1 else ""
    parts = [
        "# Search",
        f"`{settings['flags of train']}`, {settings['max_steps']} steps; {metric} on the dev split, mean{several}.",
    ]
    if report["by_length"]:
        parts.append(_table("The best setting of each length", report["by_length"], metric).markdown())
    if by_init:
        curves, reached = by_init["courses"], by_init["steps_to_loss"]
        steps = [f"step {point['step']}" for point in next(iter(curves.values()))]
        rows = [
            [init, *(f"{point['score']:.4g} ({point['loss']:.3f})" for point in curve), str(reached[init])]
            for init, curve in curves.items()
        ]
        headings = ["prefix_init", *steps, f"steps to a loss of {by_init['loss']:.3f}"]
        parts += [
            Table(headings, rows, "Initial values").markdown(),
            f"{metric} and, in brackets, loss (nats) on the dev split: means over the seeds and the "
            f"{by_init['settings']} settings that all of them finished.",
        ]
    if report["trials"]:
        parts.append(_table("All trials", report["trials"], metric).markdown())
    if report["commands"]:
        parts += ["## Commands of the best setting", "```bash\n" + "\n".join(report["commands"]) + "\n```"]
    return parts


def _draw(report: Mapping[str, Any], finished: Sequence[Row], folder: Path) -> None:
    metric = report["settings"]["metric"]
    by_length: dict[str, list[Mark]] = {}
    for (projection, length), row in _best(finished, "prefix_projection", "pre_seq_len").items():
        name = "with projection" if projection else "without projection"
        by_length.setdefault(name, []).append(Mark(length, row["mean"], row["deviation"]))
    x_label = "pre_seq_len (best learning rate of each)"
    draw_lines(folder / "score_by_length.png", by_length, x_label, metric, log_base=2)
    by_rate: dict[str, list[Mark]] = {}
    for (length, rate), row in _best(finished, "pre_seq_len", "learning_rate").items():
        by_rate.setdefault(f"pre_seq_len {length}", []).append(Mark(rate, row["mean"], row["deviation"]))
    if len({row["setting"]["learning_rate"] for row in finished}) > 1:
        draw_lines(folder / "score_by_learning_rate.png", by_rate, "learning_rate", metric, log_base=10)
    if report["by_init"]:
        curves = {
            init: [Mark(point["step"], point["loss"], point["loss_deviation"]) for point in curve]
            for init, curve in report["by_init"]["courses"].items()
        }
        draw_lines(folder / "course_by_init.png", curves, "step", "loss on the dev split (nats)")
