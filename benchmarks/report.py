"""The results as a table, as JSON, in Markdown and as a picture."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.golden import Check
from benchmarks.quantities import Result
from benchmarks.timing import Sample
from chatglm_ptuning.figures import drawing
from chatglm_ptuning.files import write_json, write_text
from chatglm_ptuning.tables import Table
from chatglm_ptuning.version import kit_version

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "benchmark.json", "benchmark.md", "benchmark.png"
MACHINE_FILE = "machine.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "flash-attn")
_HEADINGS = ("quantity", "compared with", "this kit", "the other", "ratio", "goal", "holds", "better")


def environment(device: torch.device) -> dict[str, Any]:
    """Date, machine, and versions."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "chatglm-ptuning": kit_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "dtype": "float32" if device.type == "cpu" else "bfloat16",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average_before": os.getloadavg()[0],
        "versions": versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def described(facts: dict[str, Any]) -> str:
    """Date, machine and versions in one line."""
    machine = facts["gpu"] or f"{facts['processor']}, {facts['threads']} threads"
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found)
    return f"{facts['date'][:10]}, {machine}, {facts['dtype']}; {versions}"


def table(results: Sequence[Result], title: str = "") -> Table:
    """The results, each with the median, and the smallest and largest value in brackets."""
    return Table(_HEADINGS, [_cells(result) for result in results], title)


def _cells(result: Result) -> list[str]:
    quantity = result.quantity
    goal = ""
    if result.goal is not None:
        goal = f"{'≤' if quantity.less_is_better else '≥'} {result.goal:g}"
    return [
        f"{result.shape}: {quantity.what}, {quantity.unit}",
        quantity.theirs,
        _spread(result.ours, quantity.digits),
        "" if result.theirs is None else _spread(result.theirs, quantity.digits),
        "" if result.ratio is None else f"{result.ratio:.2f}",
        goal,
        {True: "yes", False: "no", None: ""}[result.holds],
        result.winner,
    ]


def _spread(sample: Sample, digits: int) -> str:
    least, most = sample.spread
    text = f"{sample.median:.{digits}f}"
    return text if len(sample.values) == 1 else f"{text} ({least:.{digits}f}-{most:.{digits}f})"


def write(folder: Path, results: Sequence[Result], checks: Sequence[Check], facts: dict[str, Any]) -> None:
    """Writes the files of the report into a folder; called again, it replaces them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON_FILE, [result.as_json() for result in results])
    write_json(folder / MACHINE_FILE, facts | {"checks": [check.as_json() for check in checks]})
    write_text(folder / MARKDOWN_FILE, f"{table(results).markdown()}\n\n{described(facts)}.\n")
    draw(folder / PICTURE_FILE, [result for result in results if result.ratio is not None], described(facts))


def draw(path: Path, results: Sequence[Result], title: str) -> None:
    """Writes a PNG of the ratios, with the goals as marks."""
    if not results:
        return
    names = [f"{row.quantity.what}, {row.shape}\nvs. {row.quantity.theirs}" for row in results]
    with drawing(path, 9, 0.5 * len(results) + 1.5) as axes:
        places = range(len(results))
        colours = ["#c44e52" if row.holds is False else "#4c72b0" for row in results]
        bars = axes.barh(places, [row.ratio for row in results], 0.6, color=colours)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        for place, row in enumerate(results):
            if row.goal is not None:
                mark = "<" if row.quantity.less_is_better else ">"
                axes.plot(row.goal, place, mark, color="black", markersize=7)
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.set_yticks(places, names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("this kit / the other side   (> at least, < at most: the goal)")
        axes.set_title(title.replace("; ", "\n"), fontsize=8)
        axes.margins(x=0.1)
