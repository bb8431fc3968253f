"""Peak memory of a training step on a CPU, each in a process of its own; as a program it prints that of one side."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from benchmarks.shapes import SHAPES, Shape, advertisements, make_model
from benchmarks.sides import Kit, Official, Padded

_SMALLEST_MAPPING = 2**16
"""Bytes from which on the C library gives memory back to the system at once, so that resident memory is what is used.
By default the limit grows while a program runs."""


def peak_memory(shape: Shape, side: str) -> float:
    """Bytes that a step of a side needs beyond weights and optimizer, measured in a process of its own.

    Raises:
        RuntimeError: with the output of the process, if it fails.
    """
    returned = {name: str(_SMALLEST_MAPPING) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-m", __name__, shape.name, side],
        env=kept | returned | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {side} on {shape.name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: Shape, side: str, folder: Path) -> int:
    """As `peak_memory`, in this process, which has measured nothing else. Works on Linux alone."""
    rows = advertisements(shape, shape.memory_batch)
    model = make_model(shape, torch.device("cpu"), torch.float32)
    make = {Kit.name: partial(Kit, folder=folder), Official.name: Official}[side]
    trained = make(model, [rows])
    first = rows[0] | {"labels": rows[0]["input_ids"]}
    Padded(model, [[{name: values[:2] for name, values in first.items()}]]).step()  # loads libraries
    _return_free_memory()
    before = kib_of("self", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trained.step()
    return (kib_of("self", "VmHWM") - before) * 1024


def _return_free_memory() -> None:
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def kib_of(process: int | str, field: str) -> int:
    """A field of the memory of a process: its id, or "self". Works on Linux alone."""
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    return int(status.split(f"{field}:")[1].split()[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(SHAPES[sys.argv[1]], sys.argv[2], Path(scratch))))
