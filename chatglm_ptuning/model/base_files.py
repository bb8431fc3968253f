"""The weights of a base in the files of its folder, which are read and written a shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from chatglm_ptuning.files import (
    read_json_object,
    read_tensors,
    read_weight_map,
    tensor_names,
    write_json,
    write_tensors,
)
from chatglm_ptuning.model.base_weights import describe_missing, fingerprint_with
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.native_glm import glm_names

# In the order in which transformers looks for them.
_WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class BaseFiles:
    """A base in its folder, in the official format or in that of GlmForCausalLM; no more than a shard is in memory.

    Attributes:
        config: its configuration, without a prefix.
        is_glm: whether the folder is in the format of GlmForCausalLM.
        shards: the official names of the parameters, as the files divide them. Other tensors in the files, such as a
            prefix, are not among them.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if the base is of another family, quantised, damaged or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = ChatGLMConfig.from_pretrained(folder)
        if self.config.quantization_bit:
            raise ValueError(
                f"{folder} is quantised to {self.config.quantization_bit} bits. Name the folder of the base that it "
                "was made from, such as chatglm2-6b for chatglm2-6b-int4."
            )
        self.is_glm = read_json_object(folder / "config.json").get("model_type") == "glm"
        with torch.device("meta"):
            parameters = ChatGLMForConditionalGeneration(self.config).named_parameters()
        self._sizes = {name: parameter.shape for name, parameter in parameters}
        self._file_of = _files_of_tensors(folder)
        missing = [name for name in self._sizes if not self._file_of.keys() >= set(self._stored(name))]
        if missing:
            raise ValueError(describe_missing(str(folder), missing))
        by_file: dict[Path, list[str]] = {}
        for name in self._sizes:
            by_file.setdefault(self._file_of[self._stored(name)[0]], []).append(name)
        self.shards = [by_file[file] for file in sorted(by_file)]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads parameters by their official names, in the dtype of the file.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing, damaged, or has a parameter of another size.
        """
        names = list(names)
        wanted: dict[Path, set[str]] = {}
        for part in (part for name in names for part in self._stored(name)):
            wanted.setdefault(self._file_of[part], set()).add(part)
        parts: dict[str, torch.Tensor] = {}
        for file, inside in wanted.items():
            parts |= read_tensors(file, inside.__contains__)
        found = {}
        for name in names:
            stored = self._stored(name)
            file = self._file_of[stored[0]]
            if not parts.keys() >= set(stored):
                raise ValueError(f"{file} lacks {', '.join(stored)}, which its index names. Copy it again.")
            own = [parts.pop(part) for part in stored]
            found[name] = own[0] if len(own) == 1 else torch.cat(own)
            if found[name].shape != self._sizes[name]:
                raise ValueError(
                    f"{file} has {name} of size {tuple(found[name].shape)}; config.json beside it gives "
                    f"{tuple(self._sizes[name])}."
                )
        return found

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint by which prefixes recognise the base, see `fingerprint_with`."""

        def read(name: str) -> tuple[torch.Tensor, bool]:
            return next(iter(self.read([f"transformer.{name}"]).values())), True

        return fingerprint_with(self.config, read)

    def copy_weights(
        self,
        folder: Path,
        convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
        added: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes the weights as safetensors, in as many shards as here.

        Args:
            folder: where nothing of these names is.
            convert: makes the tensors to write of the parameters of a shard.
            added: tensors to write beside them, into the last shard.

        Raises:
            FileNotFoundError, ValueError: as `read`.
            OSError: if the disk is full.
        """
        count, size, shard_of = len(self.shards), 0, {}
        for index, names in enumerate(tqdm(self.shards, desc=f"copying {self.folder.name}", delay=3)):
            tensors = convert(self.read(names))
            if index == count - 1:
                tensors |= added or {}
            file = f"model-{index + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            write_tensors(folder / file, tensors)
            size += sum(value.numel() * value.element_size() for value in tensors.values())
            shard_of |= dict.fromkeys(tensors, file)
            del tensors  # before the next shard is read
        if count > 1:
            index = {"metadata": {"total_size": size}, "weight_map": shard_of}
            write_json(folder / "model.safetensors.index.json", index)

    def _stored(self, name: str) -> list[str]:
        """The names in the files of a parameter."""
        return glm_names(name) if self.is_glm else [name]


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor in a folder.

    Raises:
        FileNotFoundError, ValueError: if there are no weights, or their file is damaged.
    """
    source = next((folder / name for name in _WEIGHTS_FILES if (folder / name).exists()), None)
    if source is None:
        raise FileNotFoundError(f"{folder} is not a base: it has none of {', '.join(_WEIGHTS_FILES)}.")
    if source.suffix == ".json":
        return {name: folder / file for name, file in read_weight_map(source).items()}
    return dict.fromkeys(tensor_names(source), source)
