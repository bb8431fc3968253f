"""What a ChatGLM model can do with prefixes: load, save, switch, initialise."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from os import PathLike
from typing import Any

import torch
from transformers.utils import logging

from chatglm_ptuning.model.base_weights import fingerprint_of_base
from chatglm_ptuning.model.first_values import FirstValues
from chatglm_ptuning.model.prefix_encoder import PrefixEncoder
from chatglm_ptuning.model.prefix_switch import TRAINABLE_PREFIX, PrefixSwitch
from chatglm_ptuning.model.virtual_tokens import key_values_before
from chatglm_ptuning.model.zero3 import gathered, gathering_modules, is_partitioned, whole_shape
from chatglm_ptuning.prefix.bank import PrefixSelection
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint, PrefixMetadata, has_projection
from chatglm_ptuning.prefix.fit import Recipient, check_fits
from chatglm_ptuning.prefix.formats import kit, read_prefix

logger = logging.get_logger(__name__)


class PrefixMixin:
    """Prefix methods of a ChatGLM model and of the models around it.

    The state lives in the ChatGLMModel inside: the trainable prefix in its `prefix_encoder`, the loaded ones and the
    choice among them in its `prefixes`. A model with a head keeps one head for each prefix that came with one.
    """

    @property
    def _trainable(self) -> PrefixEncoder | None:
        return getattr(self.base_model, "prefix_encoder", None)

    @property
    def _switch(self) -> PrefixSwitch:
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
        """Names that `set_prefix` takes: the trainable prefix (as "default"), then the loaded ones."""
        trainable = [] if self._trainable is None else [TRAINABLE_PREFIX]
        return trainable + self._switch.bank.names

    @property
    def selected_prefix(self) -> PrefixSelection:
        """What `set_prefix` chose last: a name, None, or a tuple with one of these per batch row."""
        return self._switch.selection

    def set_prefix(self, name: str | Sequence[str | None] | None) -> None:
        """Chooses the prefix of the following calls, and the head that was loaded with it.

        Args:
            name: a loaded prefix; None for the plain base; or a list with a name or None for every batch row. In
                `generate` the beams and the returned sequences of a row share its prefix.

        Raises:
            KeyError: if a prefix of that name is not loaded; the message lists those that are.
            ValueError: if the list is empty, or names several prefixes in a model with a head.
        """
        single = name is None or isinstance(name, str)
        names = [name] if single else list(name)
        if not names:
            raise ValueError("set_prefix needs a name, None, or a list with at least one entry.")
        for entry in names:
            if entry is not None:
                self._check_loaded(entry)
        different = sorted({entry for entry in names if entry is not None})
        if len(different) > 1 and self._heads():
            raise ValueError(
                f"{type(self).__name__} has one head, so one prefix at a time: got {', '.join(different)}."
            )
        heads = self._heads()
        if heads and self._is_trainable(self.selected_prefix):
            self._switch.heads[TRAINABLE_PREFIX] = {key: value.detach().clone() for key, value in heads.items()}
        self._switch.selection = name if single else tuple(names)
        for entry in different:
            self._set_heads(self._switch.heads.get(entry, {}))

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
        with gathered(self._trainable_parameters(), modify=True):
            if self._is_trainable(name):
                self._replace_trainable(encoder, checkpoint)
            else:
                self._switch.bank.add(name, encoder.key_values(), checkpoint.metadata.trained)
            self._switch.mark_changed(name)
            self.set_prefix(name)
            heads = {key: checkpoint.heads[key] for key in self._heads()}
            self._set_heads(heads)
            self._switch.heads[name] = heads

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
        self._check_loaded(name)
        if name in self._switch.selected_names:
            self.set_prefix(None)
        self._switch.bank.remove(name)
        self._switch.heads.pop(name, None)

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
            bank = self._switch.bank
            parameters, trained = {"embedding.weight": bank[name].flatten(1)}, not bank.is_untrained(name)
        if any(value.numel() == 0 for value in parameters.values()):
            raise ValueError(
                "The prefix is partitioned among processes (ZeRO-3): call save_prefix within "
                "deepspeed.zero.GatheredParameters(model.parameters()), on every process."
            )
        metadata = PrefixMetadata(
            len(parameters["embedding.weight"]),
            has_projection(parameters),
            *base.config.prefix_shape.sizes,
            base_model_name=base.config.name_or_path or None,
            base_fingerprint=self.base_fingerprint(),
            trained=trained and not self._untrained_heads(),
            **details,
        )
        kit.write(path, metadata, parameters, self._heads())

    def base_fingerprint(self) -> dict[str, Any]:
        """What prefixes of this base are known by, see `fingerprint_of_base`.

        Under ZeRO-3 every process must take part the first time; it is remembered then, as the base is frozen.
        """
        base = self.base_model
        if not is_partitioned(base.parameters()):
            return fingerprint_of_base(base)
        if self._switch.base_fingerprint is None:
            self._switch.base_fingerprint = fingerprint_of_base(base)
        return self._switch.base_fingerprint

    def _trainable_parameters(self) -> list[torch.nn.Parameter]:
        encoder = self._trainable
        return [*([] if encoder is None else encoder.parameters()), *self._heads().values()]

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
        self._switch.mark_changed(TRAINABLE_PREFIX)

    def check_prefix_is_trained(self) -> None:
        """Refuses inference with a prefix or a linear head that still has its random first values.

        Raises:
            ValueError: in that case.
        """
        for name in self._switch.selected_names:
            if self._is_trainable(name) and self._trainable.is_untrained:
                raise ValueError(
                    f"The prefix of pre_seq_len={self._trainable.pre_seq_len} is untrained: its values are random. "
                    "Load a trained one by load_prefix(path), or use the plain base by set_prefix(None)."
                )
            if not self._is_trainable(name) and self._switch.bank.is_untrained(name):
                raise ValueError(
                    f"The prefix {name!r} was saved untrained: its values are random. Load a trained one by "
                    "load_prefix(path), or use the plain base by set_prefix(None)."
                )
        untrained = self._untrained_heads()
        if untrained:
            raise ValueError(
                f"The {', '.join(untrained)} of {type(self).__name__} is untrained: its values are random. Train it, "
                "or load a prefix with its head by load_prefix(path)."
            )

    def _untrained_heads(self) -> list[str]:
        """Names of the linear heads that nobody has trained or loaded."""
        encoder = self._trainable
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, FirstValues) and module is not encoder and module.is_untrained
        ]

    def _check_loaded(self, name: str) -> None:
        if name not in self.prefix_names:
            raise KeyError(f"No prefix named {name!r} is loaded; loaded: {', '.join(self.prefix_names) or 'none'}.")

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
