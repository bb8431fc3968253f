"""Prefix methods of a ChatGLM model: load, save, select, initialise, and make the prefix of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.utils import logging

from chatglm_ptuning.model.base_weights import fingerprint_of_base
from chatglm_ptuning.model.placement import layer_devices
from chatglm_ptuning.model.prefix_encoder import PrefixEncoder, encoder_of
from chatglm_ptuning.model.stored_prefix import name_of_base, read_stored_prefix
from chatglm_ptuning.model.trained_module import FirstValues
from chatglm_ptuning.model.virtual_tokens import key_values_before
from chatglm_ptuning.model.zero3 import gathered, gathering_modules, is_partitioned, whole_shape
from chatglm_ptuning.prefix.bank import TRAINABLE_PREFIX, LoadedPrefix, PrefixBank
from chatglm_ptuning.prefix.batch import (
    JOINT,
    PrefixArgument,
    PrefixBatch,
    PrefixSelection,
    assemble,
    check_name,
    names_in,
)
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint, PrefixMetadata, has_projection
from chatglm_ptuning.prefix.fit import check_base, check_heads
from chatglm_ptuning.prefix.formats import kit, read_prefix

logger = logging.get_logger(__name__)


class PrefixMixin:
    """Prefix methods of a ChatGLMModel and of the models around it.

    The ChatGLMModel holds the trainable prefix (`prefix_encoder`, with the model's own head), the loaded prefixes with
    their heads (`prefixes`) and the selected one (`prefix_selection`). Forward passes and `generate` use their argument
    `prefix`, and the selected prefix without it.
    """

    head_name: ClassVar[str] = ""
    """Attribute that holds the linear head; in front of its parameters' names in a prefix checkpoint."""
    head_kind: ClassVar[str | None] = None
    """Kind of the head in a prefix checkpoint, as the heads of tasks are named. None for the language model."""
    head_key: str | None = None
    """In front of the names of the head's parameters in a prefix, if it is not `head_name`."""

    @property
    def _trainable(self) -> PrefixEncoder | None:
        return getattr(self.base_model, "prefix_encoder", None)

    @property
    def _bank(self) -> PrefixBank:
        return self.base_model.prefixes

    def _is_trainable(self, name: PrefixSelection) -> bool:
        return name == TRAINABLE_PREFIX and self._trainable is not None

    def freeze_base(self) -> None:
        """Freezes all but the prefix encoder and the head; does nothing without a prefix encoder."""
        if self._trainable is not None:
            self.base_model.requires_grad_(False)
            self._trainable.requires_grad_(True)

    @property
    def prefix_names(self) -> list[str]:
        """Names of prefixes: the trainable one (as "default"), then the loaded ones."""
        trainable = [] if self._trainable is None else [TRAINABLE_PREFIX]
        return trainable + self._bank.names

    @property
    def selected_prefix(self) -> PrefixSelection:
        """What `set_prefix` chose last: a name, None, or a tuple with one of these per batch row."""
        return self.base_model.prefix_selection

    def set_prefix(self, name: str | Sequence[str | None] | None) -> None:
        """Selects the prefix, and the head that belongs to it, of all calls without an argument `prefix`.

        Args:
            name: as for `prefix_batch`. In `generate` the beams and the returned sequences of a row share its prefix.

        Raises:
            KeyError, ValueError: as `prefix_batch`; the selection is then unchanged.
        """
        self.base_model.prefix_selection = self._checked(name)

    def prefix_batch(self, prefix: str | Sequence[str | None] | None = None) -> PrefixBatch:
        """Makes the prefix of a batch, the argument `prefix` of forward passes and `generate`.

        The trainable prefix is taken with its present values, without dropout; gradients flow back to it.

        Args:
            prefix: a name, for any number of rows; None for the plain base (with the model's own head); or a list, with
                a name or None for every row of the batch. `a+b` are the prefixes "a" and "b", one behind the other:
                the same as one prefix made of both tables.

        Raises:
            KeyError: if no prefix of that name is loaded; the message lists the loaded ones.
            ValueError: if the list is empty, or names several prefixes in a model with a head.
        """
        base = self.base_model
        return self._make_batch(self._checked(prefix), base.device, base.embedding.word_embeddings.weight.dtype)

    def resolve_prefix(self, prefix: PrefixArgument = None) -> PrefixBatch:
        """The batch that the argument `prefix` of a call means: itself, of these names, or of the selected prefix.

        Raises:
            KeyError, ValueError: as `prefix_batch`.
        """
        return prefix if isinstance(prefix, PrefixBatch) else self.prefix_batch(self._selection(prefix))

    def _prefix_for(self, prefix: PrefixArgument, states: torch.Tensor, rows: int) -> PrefixBatch:
        """The prefix of a forward pass on `rows` sequences; in training with dropout, except on a PrefixBatch.

        Raises:
            KeyError, ValueError: as `prefix_batch`; if the batch has another number of rows.
        """
        if not isinstance(prefix, PrefixBatch):
            rate = self.config.prefix_dropout if self.training and self._trainable is not None else 0.0
            prefix = self._make_batch(self._selection(prefix), states.device, states.dtype, rate, rows)
        prefix.check_rows(rows)
        return prefix

    def _make_batch(
        self, selection: PrefixSelection, device: torch.device, dtype: torch.dtype, rate: float = 0.0, rows: int = 0
    ) -> PrefixBatch:
        versions, singles = dict(self._bank.versions), {}
        for name in names_in(selection):
            if self._is_trainable(name):
                singles[name] = self._trainable.key_values().permute(1, 2, 0, 3).to(device, dtype)
            else:
                singles[name] = self._bank.key_values(name, device, dtype)
        prefixes = {}
        for name in _distinct(selection):
            parts = name.split(JOINT)
            prefixes[name] = singles[name] if len(parts) == 1 else torch.cat([singles[one] for one in parts], dim=2)
            # A new version of a part is larger than all versions so far.
            versions[name] = max(versions.get(one, 0) for one in parts)
        heads = {name: value.to(device) for name, value in self._loaded_heads(selection).items()}
        batch = assemble(selection, prefixes, versions, heads, rate, rows)
        devices = layer_devices(self.base_model.encoder.layers)
        return batch if devices is None else batch.spread(devices)

    def _heads_of(self, prefix: PrefixArgument) -> Mapping[str, torch.Tensor]:
        """Parameters of the head that was loaded with a prefix; empty if the model's own head belongs to it."""
        return prefix.heads if isinstance(prefix, PrefixBatch) else self._loaded_heads(self._selection(prefix))

    def _loaded_heads(self, selection: PrefixSelection) -> Mapping[str, torch.Tensor]:
        names = names_in(selection)
        return {} if len(names) != 1 or self._is_trainable(names[0]) else self._bank[names[0]].heads

    def _selection(self, prefix: str | Sequence[str | None] | None) -> PrefixSelection:
        return self.selected_prefix if prefix is None else self._checked(prefix)

    def _checked(self, prefix: str | Sequence[str | None] | None) -> PrefixSelection:
        selection = prefix if prefix is None or isinstance(prefix, str) else tuple(prefix)
        if selection == ():
            raise ValueError("A list of prefixes needs at least one entry, a name or None for each row.")
        names, loaded = names_in(selection), self.prefix_names
        for name in names:
            if name not in loaded:
                raise KeyError(f"No prefix named {name!r} is loaded; loaded: {', '.join(loaded) or 'none'}.")
        if len(names) > 1 and self._heads():
            raise ValueError(
                f"{type(self).__name__} has one head, so one prefix at a time: got {', '.join(sorted(names))}."
            )
        return selection

    def load_prefix(
        self, path: str | PathLike[str] | PrefixCheckpoint, name: str = TRAINABLE_PREFIX, *, task: str | None = None
    ) -> None:
        """Loads a prefix and selects it; sizes and projection come from the checkpoint.

        In a model with a trainable prefix, the name "default" means that one: it takes the checkpoint's size and
        values, and training continues from them. Under any other name, and in a plain base, the prefix is for
        inference: its projection is folded, and only keys and values are kept.

        Args:
            path: a folder written by `save_prefix` or by a training run, or a `checkpoint-N` inside it; an official
                P-Tuning v2 folder or its `pytorch_model.bin`; a PEFT prefix-tuning adapter folder; or the result of
                `read_prefix`.
            task: the task whose head is loaded, if several tasks share the prefix.

        Raises:
            FileNotFoundError: if there is no prefix at `path`.
            ValueError: if the file is damaged, does not fit the base's sizes, was trained on another base, or lacks
                this model's head; the message names the file and both sides. If the name has a "+", which stands
                between the names of prefixes that are used together. The model is then unchanged.
        """
        check_name(name)
        checkpoint = self._fitting(path, task)
        own_heads = self._heads()
        encoder = encoder_of(checkpoint, self.base_model.config)
        if self._is_trainable(name):
            with gathered([*self._trainable.parameters(), *own_heads.values()], modify=True), torch.no_grad():
                self._replace_trainable(encoder, checkpoint)
                for key, value in own_heads.items():
                    if value.is_meta:  # a copy into it would do nothing
                        raise ValueError(f"{key} has been offloaded, so it cannot be set: keep the head in memory.")
                    value.copy_(checkpoint.heads[key])
            self._bank.mark_changed(name)
        else:
            heads = {key: checkpoint.heads[key] for key in own_heads}
            self._bank.add(name, LoadedPrefix(encoder.key_values(), heads, checkpoint.metadata.trained))
        self.set_prefix(name)

    @torch.no_grad()
    def fold_prefix(self, path: str | PathLike[str] | PrefixCheckpoint) -> LoadedPrefix:
        """Reads a prefix for inference, without its head. The model is unchanged, and nothing is selected.

        Args:
            path: as for `load_prefix`.

        Raises:
            FileNotFoundError, ValueError: as `load_prefix`.
        """
        checkpoint = self._fitting(path)
        return LoadedPrefix(
            encoder_of(checkpoint, self.base_model.config).key_values(), {}, checkpoint.metadata.trained
        )

    def _fitting(self, path: str | PathLike[str] | PrefixCheckpoint, task: str | None = None) -> PrefixCheckpoint:
        """Reads a prefix and checks that it fits; arguments and errors as for `load_prefix`."""
        base = self.base_model
        checkpoint = path if isinstance(path, PrefixCheckpoint) else read_prefix(path, base.config.prefix_shape)
        if task is not None:
            checkpoint = checkpoint.of_task(task, self.head_name)
        check_base(checkpoint, base.config.prefix_shape, base.config.name_or_path or None, self.base_fingerprint)
        if self is not base:
            shapes = {key: whole_shape(value) for key, value in self._heads().items()}
            check_heads(checkpoint, type(self).__name__, shapes, self.head_kind, task)
        return checkpoint

    def _keep_stored_prefix(self, folder: Path | None) -> None:
        """Loads the prefix that the base's own folder holds, under the folder's name, without selecting it."""
        config = self.base_model.config
        checkpoint = None if folder is None else read_stored_prefix(folder, config)
        if checkpoint is not None:
            name = name_of_base(folder)
            self._bank.add(name, LoadedPrefix(encoder_of(checkpoint, self.base_model.config).key_values(), {}))
            logger.warning(
                f"{checkpoint.source} holds a prefix of {checkpoint.metadata.pre_seq_len} virtual tokens beside the "
                f"base. It is loaded as {name!r}, and used only if it is asked for: by set_prefix({name!r}), or "
                f"ptuning_checkpoint {name}."
            )

    def unload_prefix(self, name: str) -> None:
        """Removes a loaded prefix; if it was selected, the plain base is selected.

        Raises:
            KeyError: if no such prefix is loaded.
            ValueError: for the trainable prefix, which is a part of the model.
        """
        if self._is_trainable(name):
            raise ValueError(
                "The trainable prefix is a part of the model and cannot be unloaded; use set_prefix(None)."
            )
        if name not in self._bank:
            self._checked(name)
            raise KeyError(f"{name!r} names several prefixes; unload them one by one.")
        if name in names_in(self.selected_prefix):
            self.set_prefix(None)
        self._bank.remove(name)

    def save_prefix(self, path: str | PathLike[str], **details: Any) -> None:
        """Writes the selected prefix, with its head, as `prefix_config.json` and `prefix_model.safetensors`.

        A loaded prefix is written folded, the trainable one with its projection. Of `a+b` one prefix is written, which
        is both, folded.

        Args:
            path: the folder; made if missing.
            **details: fields of `PrefixMetadata` to record: `chat_format`, `task`, `training`, ...

        Raises:
            ValueError: if no prefix is selected, or one per row, or if DeepSpeed has partitioned it.
            OSError: if it cannot be written; an older prefix in the folder is then intact.
        """
        base, name = self.base_model, self.selected_prefix
        if not isinstance(name, str):
            raise ValueError(f"save_prefix writes one prefix; select it by set_prefix first (selected: {name}).")
        if self._is_trainable(name):
            parameters, trained = self._trainable.saved_parameters(), not self._trainable.is_untrained
        else:
            parts = [
                LoadedPrefix(self._trainable.key_values(), {}, not self._trainable.is_untrained)
                if self._is_trainable(one)
                else self._bank[one]
                for one in name.split(JOINT)
            ]
            table = torch.cat([part.key_values.detach().cpu() for part in parts]).flatten(1)
            parameters, trained = {"embedding.weight": table}, all(part.trained for part in parts)
        if any(value.numel() == 0 for value in parameters.values()):
            raise ValueError(
                "The prefix is partitioned among processes (ZeRO-3): call save_prefix within "
                "deepspeed.zero.GatheredParameters(model.parameters()), on every rank."
            )
        loaded_heads = self._loaded_heads(name)
        metadata = PrefixMetadata(
            len(parameters["embedding.weight"]),
            has_projection(parameters),
            *base.config.prefix_shape.sizes,
            base_model_name=base.config.name_or_path or None,
            base_fingerprint=self.base_fingerprint(),
            trained=trained and not self._untrained_heads(loaded_heads),
            **details,
        )
        kit.write(path, metadata, parameters, {**self._heads(), **loaded_heads})

    def base_fingerprint(self) -> dict[str, Any]:
        """The fingerprint by which prefixes recognise this base, see `fingerprint_of_base`.

        Under ZeRO-3 the first call must be made on every rank; later calls return the stored result, as the base is
        frozen.
        """
        base = self.base_model
        if base.known_fingerprint is not None:
            return base.known_fingerprint
        fingerprint = fingerprint_of_base(base)
        if is_partitioned(base.parameters()):
            base.known_fingerprint = fingerprint
        return fingerprint

    @torch.no_grad()
    def init_prefix_from_ids(self, input_ids: torch.Tensor) -> None:
        """Sets the trainable prefix to the keys and values that the base computes for these tokens.

        The model then gives exactly the logits of the base with these tokens in front.

        Args:
            input_ids: `[pre_seq_len]`.

        Raises:
            ValueError: if the model has no trainable prefix, or of another length.
        """
        encoder = self._trainable
        if encoder is None or input_ids.shape != (encoder.pre_seq_len,):
            length = None if encoder is None else encoder.pre_seq_len
            raise ValueError(f"Got {tuple(input_ids.shape)} tokens for a trainable prefix of length {length}.")
        base = self.base_model
        with gathering_modules(base):
            key_values = key_values_before(base, base.embedding(input_ids.to(base.device)))
        with gathered(encoder.parameters(), modify=True):
            encoder.set_key_values(key_values)
        self._bank.mark_changed(TRAINABLE_PREFIX)

    @torch.no_grad()
    def prefix_of_ids(self, input_ids: torch.Tensor, name: str) -> PrefixBatch:
        """Loads the keys and values that the base computes for these tokens as a prefix. Nothing is selected.

        With it, the model gives exactly the logits of the base with these tokens in front.

        Args:
            input_ids: `[length]`.

        Returns:
            The prefix, as by `prefix_batch(name)`.

        Raises:
            ValueError: as `load_prefix` about the name.
        """
        check_name(name)
        base = self.base_model
        key_values = key_values_before(base, base.embedding(input_ids.to(base.device)))
        self._bank.add(name, LoadedPrefix(key_values, {}))
        return self.prefix_batch(name)

    def check_prefix_is_trained(self, prefix: PrefixArgument = None) -> None:
        """Refuses inference with a prefix or a linear head that still has its random initial values.

        Args:
            prefix: as for a forward pass; by default the selected one.

        Raises:
            ValueError: if the prefix or its head is untrained.
        """
        selection = tuple(prefix.names) if isinstance(prefix, PrefixBatch) else self._selection(prefix)
        for name in names_in(selection):
            if self._is_trainable(name):
                untrained, which = self._trainable.is_untrained, f"of pre_seq_len={self._trainable.pre_seq_len} is"
            else:
                untrained, which = name in self._bank and not self._bank[name].trained, f"{name!r} was saved"
            if untrained:
                raise ValueError(
                    f"The prefix {which} untrained: its values are random. Load a trained one by load_prefix(path), "
                    "or use the plain base by set_prefix(None)."
                )
        untrained_heads = self._untrained_heads(self._heads_of(prefix))
        if untrained_heads:
            raise ValueError(
                f"The {', '.join(untrained_heads)} of {type(self).__name__} is untrained: its values are random. Train "
                "it, or load a prefix with its head by load_prefix(path)."
            )

    def _untrained_heads(self, loaded: Iterable[str]) -> list[str]:
        """Names of the model's own untrained linear heads, without those that `loaded` parameters replace."""
        replaced = {name.rpartition(".")[0] for name in loaded}
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, FirstValues)
            and module is not self._trainable
            and module.is_untrained
            and (self.head_key or name) not in replaced
        ]

    def _replace_trainable(self, encoder: PrefixEncoder, checkpoint: PrefixCheckpoint) -> None:
        base, before = self.base_model, self._trainable
        if (before.pre_seq_len, before.prefix_projection) == (encoder.pre_seq_len, encoder.prefix_projection):
            before.load_state_dict(encoder.state_dict())
        else:
            logger.warning(
                f"The trainable prefix takes its size from {checkpoint.source}: pre_seq_len {encoder.pre_seq_len}, "
                f"prefix_projection {encoder.prefix_projection} (was {before.pre_seq_len}, "
                f"{before.prefix_projection}). An optimizer made before would hold the old parameters."
            )
            base.config.pre_seq_len = encoder.pre_seq_len
            base.config.prefix_projection = encoder.prefix_projection
            base.prefix_encoder = encoder.to(before.embedding.weight.device).train(before.training)
        if not checkpoint.metadata.trained:
            self._trainable.mark_untrained()

    def _heads(self) -> dict[str, torch.nn.Parameter]:
        """Parameters outside the ChatGLMModel, which are trained beside the prefix, by their full names."""
        if self is self.base_model:
            return {}
        inside = self.base_model_prefix + "."
        return {name: value for name, value in self.named_parameters() if not name.startswith(inside)}


def _distinct(selection: PrefixSelection) -> list[str]:
    """The names in a selection, each once."""
    names = selection if isinstance(selection, tuple) else (selection,)
    return list(dict.fromkeys(name for name in names if name is not None))
