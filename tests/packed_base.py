"""Official quantised checkpoints made by arithmetic in numpy, the way the format is described, for the tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import torch
from safetensors.numpy import load_file, save_file

PACKED = ("query_key_value.weight", "self_attention.dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")


def pack_rows(weight: numpy.ndarray, bits: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """int8 numbers, two to a byte with 4 bits, and a float16 scale for each row."""
    largest = 2 ** (bits - 1) - 1
    scale = (numpy.abs(weight).max(axis=1) / largest).astype(numpy.float16)
    integers = numpy.rint(weight / scale[:, None].astype(numpy.float32)).clip(-largest - 1, largest).astype(int)
    if bits == 8:
        return integers.astype(numpy.int8), scale
    rows = [[16 * (row[i] % 16) + row[i + 1] % 16 for i in range(0, len(row), 2)] for row in integers.tolist()]
    return numpy.array(rows, dtype=numpy.uint8).view(numpy.int8), scale


def unpack_rows(packed: numpy.ndarray, scale: numpy.ndarray, bits: int) -> numpy.ndarray:
    """float32 weights of packed rows."""
    if bits == 8:
        integers = packed.astype(numpy.float32)
    else:
        table = [number - 16 if number > 7 else number for number in range(16)]
        integers = numpy.array(
            [[table[half] for byte in row for half in divmod(byte, 16)] for row in packed.view(numpy.uint8).tolist()],
            dtype=numpy.float32,
        )
    return integers * scale[:, None].astype(numpy.float32)


def make_packed_base(base: Path, folder: Path, bits: int, shards: int = 2, suffix: str = "bin") -> dict:
    """Packs a base into `folder`; returns the float32 weights that a reader must find in it, by their names."""
    folder.mkdir(parents=True)
    for name in base.iterdir():
        if name.suffix not in (".safetensors", ".bin"):
            shutil.copy(name, folder)
    config = json.loads((base / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_bit": bits}), "utf-8")
    written, expected = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith(PACKED):
            packed, scale = pack_rows(weight.astype(numpy.float32), bits)
            written |= {name: packed, f"{name}_scale": scale}
            expected[name] = unpack_rows(packed, scale, bits)
        else:
            written[name] = weight.astype(numpy.float16)
            expected[name] = written[name].astype(numpy.float32)
    stem = "pytorch_model" if suffix == "bin" else "model"
    shard_of = {}
    names = sorted(written)
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        # Cut without regard to layers: a scale may lie in another shard than its weight.
        part = {name: written[name] for name in names[number::shards]}
        if suffix == "bin":
            torch.save({name: torch.from_numpy(tensor) for name, tensor in part.items()}, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": shard_of}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), "utf-8")
    return expected
