"""Checks on the device that the model computes what the original code computes (tests/golden/README.md)."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatglm_ptuning.data.collate import PackingCollator, pack
from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"
NAMES = ("official_p5", "official_p8_projection")
_ROWS = ("input_ids", "attention_mask", "position_ids", "labels")


@dataclass(frozen=True)
class Case:
    """One base with one prefix, on disk in the official layout, and the numbers for it."""

    base: Path
    prefix: Path
    settings: dict[str, Any]
    arrays: dict[str, torch.Tensor]

    def load(
        self, attention: str = "eager", trainable: bool = False, dtype: torch.dtype = torch.float32
    ) -> ChatGLMForConditionalGeneration:
        """The base; with `trainable` also its prefix, to be trained without dropout."""
        settings = self.settings | {"prefix_dropout": 0.0} if trainable else {}
        model = ChatGLMForConditionalGeneration.from_pretrained(
            self.base, dtype=dtype, attn_implementation=attention, **settings
        )
        if trainable:
            model.load_prefix(self.prefix)
        return model

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """The padded batch of the losses and gradients."""
        return {name: self.arrays[f"train_right.{name}"] for name in _ROWS}


def bundled_case(name: str, folder: Path) -> Case:
    """A case of tests/golden, whose files are written into a folder."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items()}
    parts = {}
    for part in ("base", "prefix"):
        parts[part] = {k.removeprefix(f"{part}."): arrays.pop(k) for k in list(arrays) if k.startswith(f"{part}.")}
        (folder / part).mkdir(parents=True)
        torch.save(parts[part], folder / part / "pytorch_model.bin")
    shutil.copy(FOLDER / "official_config.json", folder / "base" / "config.json")
    length = parts["prefix"]["transformer.prefix_encoder.embedding.weight"].shape[0]
    settings = {"pre_seq_len": length, "prefix_projection": any(".trans." in key for key in parts["prefix"])}
    return Case(folder / "base", folder / "prefix", settings, arrays)


@dataclass(frozen=True)
class Check:
    """The largest difference from the original's numbers, in all cases.

    Attributes:
        attention: implementation and data type.
        value: absolute, of logits and gradients relative to the largest; of greedy tokens by how much another token's
            logit exceeds the original's choice, relative to the largest.
        error: what failed, if nothing could be compared.
    """

    attention: str
    what: str
    value: float | None
    allowed: float
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the difference is allowed."""
        return self.value is not None and self.value <= self.allowed

    def as_json(self) -> dict[str, Any]:
        """For `machine.json`."""
        return asdict(self) | {"holds": self.holds}


_ALLOWED = {
    torch.float32: {"logits": 1e-4, "greedy tokens": 1e-5, "loss": 1e-5, "prefix gradients": 1e-4},
    torch.bfloat16: {"logits": 5e-2, "greedy tokens": 5e-2, "loss": 3e-2, "prefix gradients": 0.2},
}
"""In bfloat16 about twice what rounding alone gives with eager attention on a CPU. An attention that sees too much, too
little or the wrong positions changes gradients by more than 0.5.
"""


def check_golden(device: torch.device) -> Iterator[Check]:
    """Compares logits, greedy tokens, loss and prefix gradients, padded and packed, for every attention.

    On a GPU also in bfloat16, for which there are other kernels.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    kinds = [("eager", torch.float32), ("sdpa", torch.float32)]
    if device.type == "cuda":
        kinds += [("flex_attention", torch.float32), ("sdpa", torch.bfloat16)]
        if importlib.util.find_spec("flash_attn"):
            kinds.append(("flash_attention_2", torch.bfloat16))
    with tempfile.TemporaryDirectory() as folder:
        cases = [bundled_case(name, Path(folder, name)) for name in NAMES]
        for attention, dtype in kinds:
            allowed = _ALLOWED[dtype]
            label = f"{attention}, {str(dtype).removeprefix('torch.')}"
            found: dict[str, float] = {}
            error = ""
            try:
                for case in cases:
                    for what, value in _differences(case, attention, dtype, device):
                        found[what] = max(value, found.get(what, 0.0))
            except Exception as failure:  # a missing kernel must not end the measurements
                found, error = {}, f"{type(failure).__name__}: {str(failure)[:300]}"
            for what in (*allowed, "packed loss", "packed prefix gradients"):
                yield Check(label, what, found.get(what), allowed[what.removeprefix("packed ")], error)


def _differences(case: Case, attention: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float]]:
    arrays = {name: value.to(device) for name, value in case.arrays.items()}
    for tag in ("none", "prefix"):
        model = case.load(attention, dtype=dtype).to(device).eval()
        if tag == "prefix":
            model.load_prefix(case.prefix)
        ids, tokens = arrays["plain.input_ids"], arrays[f"plain.{tag}.greedy_tokens"]
        with torch.no_grad():
            if f"plain.{tag}.logits" in arrays:
                yield "logits", _relative(model(ids).logits, arrays[f"plain.{tag}.logits"])
            logits = model(torch.cat((ids, tokens), dim=1)).logits[:, ids.shape[1] - 1 : -1].float()
        chosen = logits.gather(-1, tokens[..., None])[..., 0]
        yield "greedy tokens", ((logits.amax(-1) - chosen).max() / logits.abs().max()).item()
    model = case.load(attention, trainable=True, dtype=dtype).to(device).train()
    rows = {name: arrays[f"train_right.{name}"] for name in _ROWS}
    for packed in ("", "packed "):
        inputs = _packed(rows) | {"skip_logits": True} if packed else rows
        loss = model(**inputs).loss
        yield f"{packed}loss", abs(loss - arrays["train_right.prefix.loss_batch"]).item()
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = arrays[f"train_right.prefix.grad.{name}"]
                yield f"{packed}prefix gradients", _relative(parameter.grad, expected)


def _packed(rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The batch without its padding."""
    real = rows["attention_mask"].bool()
    examples = [
        {name: rows[name][place][own].tolist() for name in ("input_ids", "labels")} for place, own in enumerate(real)
    ]
    device = real.device
    assert all(label == IGNORED_LABEL for label in rows["labels"][~real].tolist())
    (batch,) = pack(PackingCollator()(examples)["rows"], int(real.sum()))
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
