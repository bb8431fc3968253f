"""What a ChatGLM model can do with prefixes: load, save, select, put in front of a batch, initialise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from os import PathLike
from typing import Any

import torch
from transformers.utils import logging

from chatglm_ptuning.model.base_weights import fingerprint_of_base
from chatglm_ptuning.model.first_values import FirstValues
from chatglm_ptuning.model.placement import layer_devices
from chatglm_ptuning.model.prefix_encoder import PrefixEncoder
from chatglm_ptuning.model.virtual_tokens import key_values_before
from chatglm_ptuning.model.zero3 import gathered, gathering_modules, is_partitioned, whole_shape
from chatglm_ptuning.prefix.bank import TRAINABLE_PREFIX, LoadedPrefix, PrefixBank
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch, PrefixSelection, RowDropout, assemble
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint, PrefixMetadata, has_projection
from chatglm_ptuning.prefix.fit import Recipient, check_fits
from chatglm_ptuning.prefix.formats import kit, read_prefix

logger = logging.get_logger(__name__)


class PrefixMixin:
    """Prefix methods of a ChatGLM model and of the models around it.

    The ChatGLMModel inside holds the trainable prefix (`prefix_encoder`, with the model's own head), the loaded ones
    with their heads (`prefixes`) and the selected one (`prefix_selection`). Forward passes and `generate` use the
    prefix that they are given as an argument, and the selected one where they are given none.
    """

    head_key: str | None = None
    """In front of the names of the head's parameters in a prefix, if it is not the head's name in the model."""

    @property
    def _trainable(self) -> PrefixEncoder | None:
        return getattr(self.base_model, "prefix_encoder", None)

    @property
    def _bank(self) -> PrefixBank:
        return self.base_model.prefixes

    def _is_trainable(self, name: PrefixSelection) -> bool:
        return name == TRAINABLE_PREFIX and self._trainable is not None

    def freeze_base(self) -> None:
        """Leaves the prefix encoder and the head trainable, and nothing else; does nothing without a prefix encoder."""
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
        """Selects the prefix, with the head that belongs to it, of all calls that are given no other.

        Args:
            name: as for `prefix_batch`. In `generate` the beams and the returned sequences of a row share its prefix.

        Raises:
            KeyError, ValueError: as `prefix_batch`; the selection is as before then.
        """
        self.base_model.prefix_selection = self._checked(name)

    def prefix_batch(self, prefix: str | Sequence[str | None] | None = None) -> PrefixBatch:
        """Makes the prefix of a batch, to be given to forward passes and `generate` as their argument `prefix`.

        The trainable prefix is taken as it is now, without dropout; gradients flow back to it.

        Args:
            prefix: a name, for any number of rows; None for the plain base (with the model's own head); or a list, with
                a name or None for every row of the batch.

        Raises:
            KeyError: if a prefix of that name is not loaded; the message lists those that are.
            ValueError: if the list is empty, or names several prefixes in a model with a head.
        """
        base = self.base_model
        return self._make_batch(self._checked(prefix), base.device, base.embedding.word_embeddings.weight.dtype)

    def resolve_prefix(self, prefix: PrefixArgument = None) -> PrefixBatch:
        """What the argument `prefix` of a call stands for: a batch itself, names, or None for the selected prefix.

        Raises:
            KeyError, ValueError: as `prefix_batch`.
        """
        if isinstance(prefix, PrefixBatch):
            return prefix
        return self.prefix_batch(self.selected_prefix if prefix is None else prefix)

    def _prefix_for(self, prefix: PrefixArgument, states: torch.Tensor) -> PrefixBatch:
        """The prefix of a forward pass with `states` `[batch, ...]`; with dropout in training, unless it is ready made.

        Raises:
            KeyError, ValueError: as `prefix_batch`; if the batch has another number of rows.
        """
        rows = states.shape[0]
        if not isinstance(prefix, PrefixBatch):
            rate = self.config.prefix_dropout if self.training and self._trainable is not None else 0.0
            row_dropout = RowDropout(TRAINABLE_PREFIX, rate, rows) if rate else None
            prefix = self._make_batch(self._selection(prefix), states.device, states.dtype, row_dropout)
        prefix.check_rows(rows)
        return prefix

    def _make_batch(
        self,
        selection: PrefixSelection,
        device: torch.device,
        dtype: torch.dtype,
        row_dropout: RowDropout | None = None,
    ) -> PrefixBatch:
        bank, prefixes = self._bank, {}
        for name in _distinct(selection):
            if self._is_trainable(name):
                prefixes[name] = self._trainable.key_values().permute(1, 2, 0, 3).to(device, dtype)
            else:
                prefixes[name] = bank.key_values(name, device, dtype)
        heads = {name: value.to(device) for name, value in self._loaded_heads(selection).items()}
        batch = assemble(selection, prefixes, bank.versions, heads, row_dropout)
        devices = layer_devices(self.base_model.encoder.layers)
        return batch if devices is None else batch.spread(devices)

    def _heads_of(self, prefix: PrefixArgument) -> Mapping[str, torch.Tensor]:
        """Parameters of the head that was loaded with a prefix; empty if the model's own head belongs to it."""
        if isinstance(prefix, PrefixBatch):
            return prefix.heads
        return self._loaded_heads(self._selection(prefix))

    def _loaded_heads(self, selection: PrefixSelection) -> Mapping[str, torch.Tensor]:
        names = _distinct(selection)
        return {} if len(names) != 1 or self._is_trainable(names[0]) else self._bank[names[0]].heads

    def _selection(self, prefix: str | Sequence[str | None] | None) -> PrefixSelection:
        return self.selected_prefix if prefix is None else self._checked(prefix)

    def _checked(self, prefix: str | Sequence[str | None] | None) -> PrefixSelection:
        if prefix is None or isinstance(prefix, str):
            selection = prefix
        else:
            selection = tuple(prefix)
            if not selection:
                raise ValueError("A list of prefixes needs at least one entry, a name or None for each row.")
        names = _distinct(selection)
        loaded = self.prefix_names
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
        """Loads a prefix and activates it; sizes and projection come from the checkpoint.

        In a model with a trainable prefix, the name "default" stands for that one: it takes the checkpoint's size and
        goes on training from it. Under any other name, and in a plain base, the prefix is for inference: its
        projection is folded, and only keys and values are kept.

        Args:
            path: a folder written by `save_prefix` or by a training run, or a `checkpoint-N` inside it; an official
                P-Tuning v2 folder or its `pytorch_model.bin`; a PEFT prefix-tuning adapter folder; or what
                `read_prefix` has read already.
            task: whose head to load with a prefix that several tasks share.

        Raises:
            FileNotFoundError: if there is no prefix at `path`.
            ValueError: if the file is damaged, does not fit the base's sizes, was trained on another base, or lacks
                this model's head; the message names the file, and both sides. The model is as it was before.
        """
        known = isinstance(path, PrefixCheckpoint)
        checkpoint = path if known else read_prefix(path, self.base_model.config.prefix_shape)
        if task is not None:
            checkpoint = checkpoint.of_task(task, getattr(self, "head_name", ""))
        check_fits(checkpoint, self._recipient(task))
        encoder = self._encoder_from(checkpoint)
        heads = {key: checkpoint.heads[key] for key in self._heads()}
        if self._is_trainable(name):
            with gathered([*self._trainable.parameters(), *self._heads().values()], modify=True):
                self._replace_trainable(encoder, checkpoint)
                self._set_heads(heads)
            self._bank.mark_changed(name)
        else:
            self._bank.add(name, LoadedPrefix(encoder.key_values(), heads, checkpoint.metadata.trained))
        self.set_prefix(name)

    def unload_prefix(self, name: str) -> None:
        """Forgets a loaded prefix; if it was in use, the plain base is.

        Raises:
            KeyError: if no such prefix is loaded.
            ValueError: for the trainable prefix, which is a part of the model.
        """
        if self._is_trainable(name):
            raise ValueError(
                "The trainable prefix is a part of the model and cannot be unloaded; use set_prefix(None)."
            )
        self._checked(name)
        if name in _distinct(self.selected_prefix):
            self.set_prefix(None)
        self._bank.remove(name)

    def save_prefix(self, path: str | PathLike[str], **details: Any) -> None:
        """Writes the selected prefix, with the head trained beside it, as `prefix_config.json` and
        `prefix_model.safetensors`.

        A loaded prefix is written folded, the trainable one with its projection.

        Args:
            path: the folder; made if missing.
            **details: what to record beside it: `chat_format`, `task`, `training`.

        Raises:
            ValueError: if no prefix is selected, or one per row, or if DeepSpeed has partitioned it away.
            OSError: if it cannot be written; an older prefix in the folder is intact then.
        """
        base, name = self.base_model, self.selected_prefix
        if not isinstance(name, str):
            raise ValueError(f"save_prefix writes one prefix; select it by set_prefix first (selected: {name}).")
        if self._is_trainable(name):
            parameters, trained = self._trainable.saved_parameters(), not self._trainable.is_untrained
        else:
            loaded = self._bank[name]
            parameters, trained = {"embedding.weight": loaded.key_values.flatten(1)}, loaded.trained
        if any(value.numel() == 0 for value in parameters.values()):
            raise ValueError(
                "The prefix is partitioned among processes (ZeRO-3): call save_prefix within "
                "deepspeed.zero.GatheredParameters(model.parameters()), on every process."
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
        """What prefixes of this base are known by, see `fingerprint_of_base`.

        Under ZeRO-3 every process must take part the first time; it is remembered then, as the base is frozen.
        """
        base = self.base_model
        if not is_partitioned(base.parameters()):
            return fingerprint_of_base(base)
        if base.known_fingerprint is None:
            base.known_fingerprint = fingerprint_of_base(base)
        return base.known_fingerprint

    @torch.no_grad()
    def init_prefix_from_ids(self, input_ids: torch.Tensor) -> None:
        """Sets the trainable prefix to the keys and values that the base computes for these tokens.

        With it, the model gives exactly the logits of the base with these tokens in front.

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

    def check_prefix_is_trained(self, prefix: PrefixArgument = None) -> None:
        """Refuses inference with a prefix or a linear head that still has its random first values.

        Args:
            prefix: as for a forward pass; by default the selected one.

        Raises:
            ValueError: in that case.
        """
        names = prefix.names if isinstance(prefix, PrefixBatch) else _distinct(self._selection(prefix))
        for name in names:
            if self._is_trainable(name) and self._trainable.is_untrained:
                raise ValueError(
                    f"The prefix of pre_seq_len={self._trainable.pre_seq_len} is untrained: its values are random. "
                    "Load a trained one by load_prefix(path), or use the plain base by set_prefix(None)."
                )
            if not self._is_trainable(name) and name in self._bank and not self._bank[name].trained:
                raise ValueError(
                    f"The prefix {name!r} was saved untrained: its values are random. Load a trained one by "
                    "load_prefix(path), or use the plain base by set_prefix(None)."
                )
        untrained = self._untrained_heads(self._heads_of(prefix))
        if untrained:
            raise ValueError(
                f"The {', '.join(untrained)} of {type(self).__name__} is untrained: its values are random. Train it, "
                "or load a prefix with its head by load_prefix(path)."
            )

    def _untrained_heads(self, loaded: Iterable[str]) -> list[str]:
        """Names of the model's own linear heads that nobody has trained, but for those that `loaded` ones replace."""
        replaced = {name.rpartition(".")[0] for name in loaded}
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, FirstValues)
            and module is not self._trainable
            and module.is_untrained
            and (self.head_key or name) not in replaced
        ]

    def _recipient(self, task: str | None) -> Recipient:
        """This model, as a prefix is checked against it."""
        base = self.base_model
        heads = {name: whole_shape(value) for name, value in self._heads().items()}
        return Recipient(
            type(self).__name__,
            base.config.prefix_shape,
            base.config.name_or_path or None,
            self.base_fingerprint,
            None if self is base else heads,
            getattr(self, "head_kind", None),
            task,
        )

    def _encoder_from(self, checkpoint: PrefixCheckpoint) -> PrefixEncoder:
        """The checkpoint as an encoder on the CPU."""
        config = copy(self.base_model.config)
        config.pre_seq_len = checkpoint.metadata.pre_seq_len
        config.prefix_projection = checkpoint.metadata.prefix_projection
        encoder = PrefixEncoder(config)
        try:
            encoder.load_state_dict(checkpoint.parameters)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint.source} is not a whole prefix: {error}") from error
        return encoder

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

    @torch.no_grad()
    def _set_heads(self, heads: dict[str, torch.Tensor]) -> None:
        ours = self._heads()
        for name, value in heads.items():
            if ours[name].is_meta:  # a copy into it would do nothing
                raise ValueError(f"{name} has been offloaded, so it cannot be set: keep the head in memory.")
            ours[name].copy_(value)


def _distinct(selection: PrefixSelection) -> list[str]:
    """The names in a selection, each once."""
    names = selection if isinstance(selection, tuple) else (selection,)
    return list(dict.fromkeys(name for name in names if name is not None))
