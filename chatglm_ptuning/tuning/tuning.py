"""What every way of tuning can do, and those that need nothing but this kit: prefix, head alone, all parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.files import read_tensors
from chatglm_ptuning.prefix.fingerprint import difference
from chatglm_ptuning.tuning.record import RECORD_FILE, TuningRecord, clear, read_record, write_together

HEAD_FILE = "head_model.safetensors"


class Tuning(ABC):
    """A base with what is tuned on it, which after construction is all that requires gradients.

    Args:
        model: a ChatGLM model with a head, as it was loaded.
    """

    method: ClassVar[str]
    described = "tuned"
    """Over a column of scores."""
    keeps_base = True
    """Whether the plain base can be had from the tuned model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base_fingerprint = model.base_fingerprint()

    @abstractmethod
    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """Writes what is trained, and nothing of a frozen base.

        Args:
            details: what to record beside it: `chat_format`, `task`, `training`.

        Raises:
            OSError: if it cannot be written; no half of it counts as a whole checkpoint then.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Sets what is trained to the values of a checkpoint of the same method, and goes on from them.

        Raises:
            FileNotFoundError, ValueError: if it is missing, damaged, of another method, size or base.
        """

    @contextmanager
    def plain_base(self) -> Iterator[None]:
        """Inside, the model computes as the base did before the tuning (the head stays as it is)."""
        yield

    def settings(self) -> dict[str, Any]:
        """What `tuning.json` records of the method's settings."""
        return {}

    def heads(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of the linear head by their names in the model; none for the language model."""
        return heads_of(self.model)

    def record(self, details: dict[str, Any]) -> TuningRecord:
        """What is to be written as `tuning.json`."""
        name = self.model.config.name_or_path or None
        return TuningRecord(self.method, name, self.base_fingerprint, settings=self.settings(), details=details)

    def checked_record(self, folder: Path) -> TuningRecord:
        """The record of a checkpoint of this method on this base.

        Raises:
            FileNotFoundError, ValueError: if it is none, or of another method or base.
        """
        record = read_record(folder)
        if record is None:
            raise FileNotFoundError(f"{folder} holds no {RECORD_FILE}: it is no checkpoint of --tuning {self.method}.")
        if record.tuning != self.method:
            raise ValueError(f"{folder} was trained by --tuning {record.tuning}, not {self.method}.")
        missing = [name for name in record.files if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"The checkpoint in {folder} is incomplete: {', '.join(missing)} is missing.")
        self._check_base(folder, record)
        return record

    def _check_base(self, folder: Path, record: TuningRecord) -> None:
        what = difference(record.base_fingerprint, self.base_fingerprint)
        if what is not None:
            raise ValueError(
                f"{folder / RECORD_FILE} was trained on another base: on {record.base_model_name or 'an unnamed one'}, "
                f"and this one is {self.model.config.name_or_path or 'unnamed'} ({what})."
            )


class PrefixTuning(Tuning):
    """P-Tuning v2: keys and values in front of every layer, and a head. A folder without a record is one of these."""

    method = "ptuning_v2"
    described = "with prefix"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model  # a prefix checkpoint has its own record of the base

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """As `Tuning.save`: a prefix checkpoint."""
        if (folder / RECORD_FILE).exists():
            clear(folder)
        self.model.save_prefix(folder, **details)

    def load(self, folder: Path) -> None:
        """As `Tuning.load`, by `load_prefix`: any form of prefix, also a folded prompt."""
        self.model.load_prefix(folder)

    @contextmanager
    def plain_base(self) -> Iterator[None]:
        """As `Tuning.plain_base`: with no prefix selected."""
        selected = self.model.selected_prefix
        self.model.set_prefix(None)
        try:
            yield
        finally:
            self.model.set_prefix(selected)


class NoTuning(Tuning):
    """The plain base, for evaluation."""

    method = "none"
    described = "base"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False)

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """Refused: there is nothing to save."""
        raise ValueError("--tuning none trains nothing, so there is nothing to save.")

    def load(self, folder: Path) -> None:
        """Refused: there is nothing to load."""
        raise ValueError(f"--tuning none is the plain base; {folder} cannot be loaded into it.")


class HeadTuning(Tuning):
    """The linear head alone, on the frozen base.

    Raises:
        ValueError: if the model has no linear head.
    """

    method = "head_only"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if not self.heads():
            raise ValueError(
                "--tuning head_only trains a linear head, and generation has none. Choose a task with a head, or "
                "another --tuning."
            )
        model.requires_grad_(False)
        for parameter in self.heads().values():
            parameter.requires_grad_(True)

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """As `Tuning.save`: `head_model.safetensors` and the record."""
        with write_together(folder, self.record(details)) as place:
            save_file(on_cpu(self.heads()), place / HEAD_FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """As `Tuning.load`."""
        self.checked_record(folder)
        set_heads(self.model, read_tensors(folder / HEAD_FILE), folder / HEAD_FILE)


class FullTuning(Tuning):
    """All parameters that the model computes with; a checkpoint is a base in the official layout.

    Args:
        tokenizer: saved with every checkpoint, so that it can be used as a base by its folder's name.

    Raises:
        ValueError: if the base is quantised.
    """

    method = "full"
    keeps_base = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(model)
        if getattr(model, "is_quantized", False):
            raise ValueError("--tuning full cannot train a quantised base: leave --quantization_bit out, or use lora.")
        self.tokenizer = tokenizer
        model.requires_grad_(True)
        if self.heads():
            model.transformer.output_layer.requires_grad_(False)  # a linear head does not pass through it

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """As `Tuning.save`: the whole model and its tokenizer, in safetensors.

        Raises:
            ValueError: if the folder is the base's own.
        """
        check_not_the_base(self.model, folder)
        with write_together(folder, self.record(details)) as place:
            self.model.save_pretrained(place)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(place)

    def load(self, folder: Path) -> None:
        """As `Tuning.load`."""
        record = self.checked_record(folder)
        tensors: dict[str, torch.Tensor] = {}
        for name in record.files:
            if name.endswith(".safetensors"):
                tensors |= read_tensors(folder / name)
        try:
            self.model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder} does not fit {type(self.model).__name__} here: {error}") from error

    @contextmanager
    def plain_base(self) -> Iterator[None]:
        """Refused: its parameters are no longer there."""
        raise ValueError(
            "With --tuning full the base itself has changed, so it cannot be compared with here. Score the base by "
            "itself: --ptuning_checkpoint none."
        )
        yield

    def _check_base(self, folder: Path, record: TuningRecord) -> None:
        shape = self.base_fingerprint["shape"]
        own = self.model.config.name_or_path and Path(self.model.config.name_or_path).resolve() == folder.resolve()
        if own and record.base_fingerprint["shape"] == shape:
            return  # the checkpoint itself was loaded as the base
        super()._check_base(folder, record)


def check_not_the_base(model: PreTrainedModel, folder: Path) -> None:
    """Refuses to write a whole model into the folder that it was loaded from.

    Raises:
        ValueError: if that is the folder.
    """
    base = Path(model.config.name_or_path)
    if base.exists() and folder.exists() and base.samefile(folder):
        raise ValueError(f"{folder} holds the base that is being tuned: choose another folder for what comes of it.")


def heads_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters outside the ChatGLMModel by their names: those of a linear head."""
    inside = model.base_model_prefix + "."
    return {name: value for name, value in model.named_parameters() if not name.startswith(inside)}


@torch.no_grad()
def set_heads(model: PreTrainedModel, values: dict[str, torch.Tensor], source: Path) -> None:
    """Sets the parameters of the linear head.

    Raises:
        ValueError: if the source has another head.
    """
    ours = heads_of(model)
    found = {name: tuple(value.shape) for name, value in values.items()}
    wanted = {name: tuple(value.shape) for name, value in ours.items()}
    if found != wanted:
        raise ValueError(
            f"{source} holds a head of {found or 'no parameters'}; {type(model).__name__} here has {wanted or 'none'}."
        )
    for name, value in values.items():
        ours[name].copy_(value)


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies for a file."""
    return {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
