"""The interface of a tuning method, and the methods without PEFT: prefix, head alone, all parameters, none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatglm_ptuning.files import read_tensors
from chatglm_ptuning.prefix.batch import PrefixBatch
from chatglm_ptuning.prefix.fingerprint import difference
from chatglm_ptuning.tuning.record import RECORD_FILE, TuningRecord, clear, read_record, write_together

HEAD_FILE = "head_model.safetensors"


class Tuning(ABC):
    """A base with its tuned parameters; after construction only these require gradients.

    Args:
        model: a ChatGLM model with a head, as it was loaded.
    """

    method: ClassVar[str]
    described = "tuned"
    """Heading of a column of scores."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base_fingerprint = model.base_fingerprint()

    @abstractmethod
    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """Writes the trained parameters, and nothing of the frozen base.

        Args:
            details: to record beside it: `chat_format`, `task`, `training`.

        Raises:
            OSError: if it cannot be written; a partial checkpoint never counts as complete.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Sets the trained parameters to the values of a checkpoint of the same method.

        Raises:
            FileNotFoundError, ValueError: if it is missing, damaged, of another method, size or base.
        """

    @contextmanager
    def plain_base(self) -> Iterator[PrefixBatch | None]:
        """Inside, the model computes as the base before tuning, if called with the yielded value as `prefix`."""
        yield None

    def settings(self) -> dict[str, Any]:
        """The method's settings, for `tuning.json`."""
        return {}

    def heads(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of the linear head by their names in the model; none for the language model."""
        return heads_of(self.model)

    def record(self, details: dict[str, Any]) -> TuningRecord:
        """The content of `tuning.json`."""
        name = self.model.config.name_or_path or None
        return TuningRecord(self.method, name, self.base_fingerprint, settings=self.settings(), details=details)

    def checked_record(self, folder: Path) -> TuningRecord:
        """The record of a checkpoint of this method on this base.

        Raises:
            FileNotFoundError, ValueError: if there is none, or it is of another method or base.
        """
        record = read_record(folder)
        if record is None:
            raise FileNotFoundError(
                f"{folder} holds no {RECORD_FILE}: it is no checkpoint of the tuning method {self.method}."
            )
        if record.tuning != self.method:
            raise ValueError(f"{folder} was trained by the tuning method {record.tuning}, not {self.method}.")
        missing = [name for name in record.files if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"The checkpoint in {folder} is incomplete: {', '.join(missing)} is missing.")
        base = self.model.config.name_or_path
        if base and Path(base).resolve() == folder.resolve():
            # The checkpoint of a full tuning was loaded as the base: its weights have changed, its shape has not.
            what = None if record.base_fingerprint["shape"] == self.base_fingerprint["shape"] else "other sizes"
        else:
            what = difference(record.base_fingerprint, self.base_fingerprint)
        if what is not None:
            raise ValueError(
                f"{folder / RECORD_FILE} was trained on another base: on {record.base_model_name or 'an unnamed one'}, "
                f"and this one is {base or 'unnamed'} ({what})."
            )
        return record


class PrefixTuning(Tuning):
    """P-Tuning v2: keys and values in front of every layer, and a head. Its checkpoints have no `tuning.json`."""

    method = "ptuning_v2"
    described = "with prefix"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model  # a prefix checkpoint records the base itself

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """As `Tuning.save`: a prefix checkpoint."""
        if (folder / RECORD_FILE).exists():
            clear(folder)
        self.model.save_prefix(folder, **details)

    def load(self, folder: Path) -> None:
        """As `Tuning.load`, by `load_prefix`: any prefix format, also the prefix of a prompt."""
        self.model.load_prefix(folder)

    @contextmanager
    def plain_base(self) -> Iterator[PrefixBatch]:
        """As `Tuning.plain_base`: no prefix."""
        yield self.model.prefix_batch(None)


class NoTuning(Tuning):
    """The plain base, for evaluation."""

    method = "none"
    described = "base"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False)

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """Refused: there is nothing to save."""
        raise ValueError("The tuning method none trains nothing, so there is nothing to save.")

    def load(self, folder: Path) -> None:
        """Refused: there is nothing to load."""
        raise ValueError(f"The tuning method none is the plain base; {folder} cannot be loaded into it.")


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
                "The tuning method head_only trains a linear head, and generation has none. Choose a task with a head, "
                "or another tuning method."
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
    """All parameters that the model uses; a checkpoint is a base in the official layout.

    Args:
        tokenizer: saved with every checkpoint, so that its folder can be used as a base.

    Raises:
        ValueError: if the base is quantised.
    """

    method = "full"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(model)
        if getattr(model, "is_quantized", False):
            raise ValueError(
                "The tuning method full cannot train a quantised base: leave quantization_bit out, or use lora."
            )
        self.tokenizer = tokenizer
        model.requires_grad_(True)
        if self.heads():
            model.transformer.output_layer.requires_grad_(False)  # is not used by a linear head

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """As `Tuning.save`: all parameters and the tokenizer, in safetensors.

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
        """Refused: the base's parameters are overwritten."""
        raise ValueError(
            "The tuning method full changes the base itself, so there is no base to compare with. Score the base by "
            "itself: ptuning_checkpoint none."
        )
        yield


def check_not_the_base(model: PreTrainedModel, folder: Path) -> None:
    """Refuses to write a model into the folder that it was loaded from.

    Raises:
        ValueError: naming the folder.
    """
    base = Path(model.config.name_or_path)
    if base.exists() and folder.exists() and base.samefile(folder):
        raise ValueError(f"{folder} holds the base that is being tuned: choose another output folder.")


def heads_of(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters of the linear head by their names: those outside the ChatGLMModel."""
    inside = model.base_model_prefix + "."
    return {name: value for name, value in model.named_parameters() if not name.startswith(inside)}


@torch.no_grad()
def set_heads(model: PreTrainedModel, values: dict[str, torch.Tensor], source: Path) -> None:
    """Sets the parameters of the linear head.

    Raises:
        ValueError: if the source has another head.
    """
    ours = heads_of(model)
    check_sizes(source, values, ours, f"the head of {type(model).__name__}")
    for name, value in values.items():
        ours[name].copy_(value)


def check_sizes(source: Path, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], what: str) -> None:
    """Checks that tensors of a file have the names and sizes of those of the model.

    Raises:
        ValueError: naming the file and the first tensor that differs.
    """
    theirs, ours = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (found, wanted))
    if theirs != ours:
        name, *more = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"{source} does not fit {what}: {name} has size {theirs.get(name, 'none')} there and "
            f"{ours.get(name, 'none')} here ({1 + len(more)} differ)."
        )


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies on the CPU, to be saved."""
    return {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
