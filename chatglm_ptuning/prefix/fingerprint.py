"""Fingerprints of bases, by which a prefix recognises the base that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

_NUMBERS_PER_TENSOR = 16
# Squared difference over the sum of squares: about 0.02 for rounding to 4 bits, 1 for unrelated weights.
_QUANTIZED_TOLERANCE = 0.25
FINGERPRINT_FIELDS = frozenset({"shape", "sample_sha256", "sample"})
"""The fields that every fingerprint has."""


def fingerprint_of(
    shape: Mapping[str, Any], names: Iterable[str], read_weight: Callable[[str], tuple[torch.Tensor | None, bool]]
) -> dict[str, Any]:
    """Shape fields, a sample of the weights, and a SHA-256 over the sample.

    The sample takes evenly spaced numbers of every named weight, in bfloat16. The numbers are kept beside the hash
    because loading in another precision may round a few of them differently. Names of quantised weights are recorded:
    their numbers are approximate.

    Args:
        shape: fields that must be equal in two bases.
        names: names of the weights.
        read_weight: returns a weight by its name, or None if this process does not have it (it is then left out); and
            whether the weight has its full precision.
    """
    sample, quantized = {}, []
    for name in names:
        tensor, exact = read_weight(name)
        if tensor is None:
            continue
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, _NUMBERS_PER_TENSOR, dtype=torch.float64).long().to(flat.device)
        sample[name] = [float(number) for number in flat[index].to("cpu", torch.bfloat16)]
        if not exact:
            quantized.append(name)
    return {
        "shape": dict(shape),
        "sample_sha256": hashlib.sha256(repr(sorted(sample.items())).encode()).hexdigest(),
        "sample": sample,
        "quantized": quantized,
    }


def difference(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """How two fingerprints differ; None if they are of the same base, quantised or not.

    Weights that were quantised on either side are compared together and coarsely: 4 bits change a weight by 10 to 20 %
    of the usual size, while the weights of another base are unrelated.
    """
    for name, value in recorded["shape"].items():
        if present["shape"].get(name) != value:
            return f"{name} is {present['shape'].get(name)}, not {value}"
    if recorded["sample_sha256"] == present["sample_sha256"]:
        return None
    quantized = {*recorded.get("quantized", ()), *present.get("quantized", ())}
    errors = []
    for name in recorded["sample"].keys() & present["sample"].keys():
        ours, theirs = (torch.tensor(fingerprint["sample"][name]) for fingerprint in (present, recorded))
        if name in quantized:
            error = (ours - theirs).square().sum() / (ours.square().sum() + theirs.square().sum()).clamp(min=1e-20)
            errors.append(float(error))
        elif not torch.allclose(ours, theirs, rtol=0.02, atol=1e-6):
            return f"the weights {name} differ"
    if errors and sum(errors) / len(errors) > _QUANTIZED_TOLERANCE:
        return "the weights of its linear layers differ by more than quantisation explains"
    return None
