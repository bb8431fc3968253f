"""What a search leaves for people: tables, pictures, and the commands that repeat its best setting."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from chatglm_ptuning.files import write_atomically
from chatglm_ptuning.metrics.spread import mean_and_deviation
from chatglm_ptuning.training.searching.arguments import Setting
from chatglm_ptuning.training.searching.trial import run_flags

if TYPE_CHECKING:
    import optuna

Lines = Mapping[str, Sequence[tuple[float, float, float | None]]]
"""Name of a line -> its points: x, mean, deviation (None: of one run alone)."""

_BEST_FOLDER = "best"


def write_report(
    study: optuna.Study, folder: Path, common: Sequence[str], init_prefix_text: str | None
) -> dict[str, Any]:
    """Writes what is known by now into the folder:

    - `search.json`: the settings of the study, every trial with its course, the tables below;
    - `search.md`: trials, the best of each length, and how fast each kind of first values learns;
    - `score_by_length.png`, and where there are several, `score_by_learning_rate.png` and `course_by_init.png`;
    - `best_command.sh`: the commands of `train` that repeat the best setting, one for each seed.

    Args:
        common: flags of `train` that all trials share.

    Returns:
        The content of `search.json`.
    """
    settings = study.user_attrs["settings"]
    lower_is_better = study.direction.name == "MINIMIZE"
    rows = [_row(trial) for trial in trials_that_count(study)]
    whole = sorted(
        (row for row in rows if row["state"] == "complete"), key=lambda row: row["mean"], reverse=not lower_is_better
    )
    best = whole[0] if whole else None
    report: dict[str, Any] = {
        "settings": settings,
        "best": best,
        "commands": [] if best is None else _commands(best, settings, common, init_prefix_text),
        "by_length": _best_by_length(whole),
        "by_init": _courses_by_init(whole),
        "trials": rows,
    }
    _write(folder / "search.json", json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    _write(folder / "search.md", _markdown(report))
    if best is not None:
        _write(folder / "best_command.sh", "#!/bin/sh\n" + "\n".join(report["commands"]) + "\n")
        _draw(report, whole, folder)
    return report


def trials_that_count(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """All but those that went back into the queue, or failed and were queued again."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if "setting" in trial.user_attrs]
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    # A worker that was killed while it put its trial back leaves it running: it is still to be queued.
    back = {trial.number for trial in trials if trial.state.name == "FAIL" and "put_back" in trial.user_attrs}
    return [trial for trial in trials if trial.number not in retried | back]


def describe(trial: optuna.trial.FrozenTrial) -> str:
    """One line on a trial."""
    row = _row(trial)
    return f"{_name(row['setting'])}: {_outcome(row)}"


def print_report(report: Mapping[str, Any], folder: Path) -> None:
    """Prints the best of each length, the best of all, and how to repeat it."""
    console = Console()
    if report["by_length"]:
        table = Table("pre_seq_len", "projection", "learning_rate", "init", report["settings"]["metric"],
                      title="The best setting of each length")  # fmt: skip
        for row in report["by_length"]:
            table.add_row(*_cells(row))
        console.print(table)
    if report["best"]:
        print(f"The best is {_name(report['best']['setting'])}: {_outcome(report['best'])}. To repeat it:\n")
        print(report["commands"][0])
    pictures = ", pictures beside it" if report["best"] else ""
    print(f"\nAll trials are in {folder / 'search.md'}{pictures}.")


def _row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    seeds = {
        int(name.removeprefix("seed ")): value for name, value in trial.user_attrs.items() if name.startswith("seed ")
    }
    scores = [seed["score"] for seed in seeds.values() if "score" in seed]
    error = trial.user_attrs.get("error")
    row: dict[str, Any] = {
        "number": trial.number,
        "setting": trial.user_attrs["setting"],
        "state": {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower()),
        "seeds": seeds,
        "seconds": round(sum(seed["seconds"] for seed in seeds.values()), 1),
    }
    if row["state"] == "complete":
        row["mean"], row["deviation"] = mean_and_deviation(scores)
    return row | ({"error": error} if error else {})


def _best_by_length(whole: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each length with and without projection the best setting, `whole` being sorted by quality."""
    best: dict[tuple[bool, int], dict[str, Any]] = {}
    for row in whole:
        best.setdefault((row["setting"]["prefix_projection"], row["setting"]["pre_seq_len"]), row)
    return [
        {name: best[key][name] for name in ("number", "setting", "mean", "deviation", "state")} for key in sorted(best)
    ]


def _courses_by_init(whole: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    courses = {}
    for start in starts:
        runs = [points for group in shared for points in group[start]]
        courses[start] = []
        for at in zip(*runs, strict=True):
            steps, scores, losses = zip(*at, strict=True)
            score, score_deviation = mean_and_deviation(scores)
            loss, loss_deviation = mean_and_deviation(losses)
            courses[start].append(
                {
                    "step": steps[0],
                    "score": score,
                    "score_deviation": score_deviation,
                    "loss": loss,
                    "loss_deviation": loss_deviation,
                }
            )
    target = max(course[-1]["loss"] for course in courses.values())
    reached = {
        start: next(point["step"] for point in course if point["loss"] <= target) for start, course in courses.items()
    }
    return {"settings": len(shared), "courses": courses, "loss": target, "steps_to_loss": reached}


def _commands(
    best: Mapping[str, Any], settings: Mapping[str, Any], common: Sequence[str], text: str | None
) -> list[str]:
    setting = Setting(**best["setting"])
    return [
        shlex.join(
            ["python", "-m", "chatglm_ptuning", "train",
             *run_flags(common, setting, text, seed, settings["max_steps"], settings["eval_steps"]),
             "--output_dir", f"output/{_BEST_FOLDER}-{seed}"]
        )
        for seed in settings["seeds"]
    ]  # fmt: skip


def _name(setting: Mapping[str, Any]) -> str:
    projected = " with projection" if setting["prefix_projection"] else ""
    return (
        f"pre_seq_len {setting['pre_seq_len']}{projected}, learning_rate {setting['learning_rate']:g}, "
        f"prefix_init {setting['prefix_init']}"
    )


def _value(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:.4g}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.2g}")


def _outcome(row: Mapping[str, Any]) -> str:
    if row["state"] == "complete":
        return _value(row)
    if row["state"] == "pruned":
        step, score, _ = next(iter(row["seeds"].values()))["points"][-1]
        return f"stopped at step {step} with {score:.4g}"
    return f"failed: {row['error']}" if "error" in row else row["state"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    setting = row["setting"]
    return [
        str(setting["pre_seq_len"]),
        "yes" if setting["prefix_projection"] else "no",
        f"{setting['learning_rate']:g}",
        setting["prefix_init"],
        _outcome(row),
    ]


def _markdown(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    count = len(settings["seeds"])
    head = ["pre_seq_len", "projection", "learning_rate", "prefix_init", settings["metric"]]
    parts = [
        "# Search",
        f"`{settings['flags of train']}`, {settings['max_steps']} steps; {settings['metric']} on the dev split, mean"
        + (f" and standard deviation over the seeds {', '.join(map(str, settings['seeds']))}." if count > 1 else "."),
    ]
    if report["by_length"]:
        parts += ["## The best setting of each length", _table(head, [_cells(row) for row in report["by_length"]])]
    if report["by_init"]:
        parts += ["## First values", *_init_parts(report["by_init"], settings["metric"])]
    rows = [[str(row["number"]), *_cells(row), f"{row['seconds']:g}"] for row in report["trials"]]
    parts += ["## All trials", _table(["trial", *head, "seconds"], rows)]
    if report["commands"]:
        parts += ["## The best again", "```bash\n" + "\n".join(report["commands"]) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _init_parts(by_init: Mapping[str, Any], metric: str) -> list[str]:
    steps = [point["step"] for point in next(iter(by_init["courses"].values()))]
    rows = [
        [start, *(f"{point['score']:.4g} ({point['loss']:.3f})" for point in course),
         str(by_init["steps_to_loss"][start])]
        for start, course in by_init["courses"].items()
    ]  # fmt: skip
    head = ["prefix_init", *(f"step {step}" for step in steps), f"steps to a loss of {by_init['loss']:.3f}"]
    return [
        f"{metric} and, in brackets, loss (nats) on the dev split; means over the {by_init['settings']} "
        "settings that all of them finished, and the seeds.",
        _table(head, rows),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write(path: Path, text: str) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _draw(report: Mapping[str, Any], whole: Sequence[dict[str, Any]], folder: Path) -> None:
    metric = report["settings"]["metric"]
    by_length: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in report["by_length"]:
        name = "with projection" if row["setting"]["prefix_projection"] else "without projection"
        by_length.setdefault(name, []).append((row["setting"]["pre_seq_len"], row["mean"], row["deviation"]))
    draw_lines(folder / "score_by_length.png", by_length, "pre_seq_len (best learning rate of each)", metric, base=2)
    by_rate: dict[str, dict[float, tuple[float, float, float | None]]] = {}
    for row in whole:
        rate = row["setting"]["learning_rate"]
        line = by_rate.setdefault(f"pre_seq_len {row['setting']['pre_seq_len']}", {})
        line.setdefault(rate, (rate, row["mean"], row["deviation"]))
    if len({rate for line in by_rate.values() for rate in line}) > 1:
        lines = {name: sorted(line.values()) for name, line in by_rate.items()}
        draw_lines(folder / "score_by_learning_rate.png", lines, "learning_rate", metric, base=10)
    if report["by_init"]:
        courses = {
            start: [(point["step"], point["loss"], point["loss_deviation"]) for point in course]
            for start, course in report["by_init"]["courses"].items()
        }
        draw_lines(folder / "course_by_init.png", courses, "step", "loss on the dev split (nats)")


def draw_lines(path: Path, lines: Lines, x_label: str, y_label: str, base: float | None = None) -> None:
    """Writes a PNG of lines with their deviations as bars.

    Args:
        base: of a logarithmic x axis; None for a linear one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in lines.items():
        places, means, deviations = zip(*sorted(points), strict=True)
        bars = [deviation or 0.0 for deviation in deviations]
        axes.errorbar(places, means, yerr=bars if any(bars) else None, marker="o", capsize=3, label=name)
    if base is not None:
        axes.set_xscale("log", base=base)
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
