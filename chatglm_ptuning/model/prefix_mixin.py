"""What a ChatGLM model can do with prefixes: load, save, switch, initialise."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from os import PathLike
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from chatglm_ptuning.model.prefix_encoder import PrefixEncoder
from chatglm_ptuning.model.rotary import rotate_prefix_keys
from chatglm_ptuning.prefix.bank import ActivePrefix, PrefixBank, PrefixSelection, repeat_rows
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint, PrefixMetadata, read_prefix, write_prefix
from chatglm_ptuning.prefix.fingerprint import difference, fingerprint_of

logger = logging.get_logger(__name__)

TRAINABLE_PREFIX = "default"
"""The name under which the trainable prefix of a model with `pre_seq_len` is selected."""


class PrefixMixin:
    """Prefix methods of a ChatGLM model and of the models around it; the state lives in the ChatGLMModel inside."""

    def _set_up_prefixes(self) -> None:
        """Called once by the ChatGLMModel, after its prefix encoder, if any, has been made."""
        self._bank = PrefixBank()
        self._selection: PrefixSelection = TRAINABLE_PREFIX if hasattr(self, "prefix_encoder") else None
        self._selection_count = 0

    @property
    def _trainable(self) -> PrefixEncoder | None:
        return getattr(self.base_model, "prefix_encoder", None)

    @property
    def prefix_names(self) -> list[str]:
        """Names that `set_prefix` takes: the trainable prefix (as "default"), then the loaded ones."""
        trainable = [] if self._trainable is None else [TRAINABLE_PREFIX]
        return trainable + self.base_model._bank.names

    @property
    def selected_prefix(self) -> PrefixSelection:
        """What `set_prefix` chose last: a name, None, or a tuple with one of these per batch row."""
        return self.base_model._selection

    def set_prefix(self, name: str | Sequence[str | None] | None) -> None:
        """Chooses the prefix of the following calls.

        Args:
            name: a loaded prefix; None for the plain base; or a list with a name or None for every batch row (beams
                of a row share its prefix). In a list, the trainable prefix takes part without gradients.

        Raises:
            KeyError: if a prefix of that name is not loaded; the message lists those that are.
            ValueError: if the list is empty.
        """
        base = self.base_model
        names = [name] if name is None or isinstance(name, str) else list(name)
        if not names:
            raise ValueError("set_prefix needs a name, None, or a list with at least one entry.")
        for entry in names:
            if entry is not None and entry not in self.prefix_names:
                raise KeyError(f"No prefix named {entry!r} is loaded; loaded: {', '.join(self.prefix_names) or 'none'}.")
        base._selection = name if name is None or isinstance(name, str) else tuple(names)

    def load_prefix(self, path: str | PathLike[str], name: str = TRAINABLE_PREFIX) -> None:
        """Loads a prefix and activates it; sizes and projection come from the checkpoint.

        In a model with a trainable prefix, the name "default" stands for that one: it takes the checkpoint's size and
        goes on training from it. Under any other name, and in a plain base, the prefix is for inference: its
        projection is folded, and only keys and values are kept.

        Args:
            path: a folder written by `save_prefix` or by a training run, or a `checkpoint-N` inside it; an official
                P-Tuning v2 folder or its `pytorch_model.bin`; or a PEFT prefix-tuning adapter folder.

        Raises:
            FileNotFoundError: if there is no prefix at `path`.
            ValueError: if the file is damaged, does not fit the base's sizes, or was trained on another base; the
                message names the file, and both sides.
        """
        base = self.base_model
        checkpoint = read_prefix(path, base.config)
        checkpoint.check_sizes(base.config)
        self._check_base(checkpoint)
        encoder = self._encoder_from(checkpoint)
        if name == TRAINABLE_PREFIX and self._trainable is not None:
            self._replace_trainable(encoder, checkpoint)
        else:
            base._bank.add(name, encoder.key_values())
        self.set_prefix(name)
        base._selection_count += 1
        self._load_heads(checkpoint)

    def unload_prefix(self, name: str) -> None:
        """Forgets a loaded prefix; if it was in use, the plain base is.

        Raises:
            KeyError: if no such prefix is loaded.
            ValueError: for the trainable prefix, which is a part of the model.
        """
        base = self.base_model
        if name == TRAINABLE_PREFIX and self._trainable is not None:
            raise ValueError("The trainable prefix is a part of the model and cannot be unloaded; use set_prefix(None).")
        if name not in base._bank:
            raise KeyError(f"No prefix named {name!r} is loaded; loaded: {', '.join(self.prefix_names) or 'none'}.")
        base._bank.remove(name)
        if name == base._selection or (isinstance(base._selection, tuple) and name in base._selection):
            self.set_prefix(None)

    def save_prefix(self, path: str | PathLike[str], **details: Any) -> None:
        """Writes the selected prefix as `prefix_config.json` and `prefix_model.safetensors`.

        A loaded prefix is written folded, the trainable one with its projection.

        Args:
            path: the folder; made if missing.
            **details: what to record beside it: `chat_format`, `task`, `training`.

        Raises:
            ValueError: if no prefix is selected, or one per row.
            OSError: if it cannot be written; an older prefix in the folder is intact then.
        """
        base = self.base_model
        name = base._selection
        if not isinstance(name, str):
            raise ValueError(f"save_prefix writes one prefix; select it by set_prefix first (selected: {name}).")
        if name == TRAINABLE_PREFIX and self._trainable is not None:
            parameters = self._trainable.state_dict()
        else:
            parameters = {"embedding.weight": base._bank[name].flatten(1)}
        config = base.config
        metadata = PrefixMetadata(
            pre_seq_len=parameters["embedding.weight"].shape[0],
            prefix_projection="trans.0.weight" in parameters,
            num_layers=config.num_layers,
            multi_query_group_num=config.multi_query_group_num,
            kv_channels=config.kv_channels,
            base_model_name=config.name_or_path or None,
            base_fingerprint=fingerprint_of(config, dict(base.named_parameters())),
            **details,
        )
        write_prefix(path, metadata, parameters, self._heads())

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
        base, selection = self.base_model, self.selected_prefix
        was_training = base.training
        base.eval()
        self.set_prefix(None)
        try:
            cache = base(input_ids[None].to(base.device), use_cache=True).past_key_values
        finally:
            self.set_prefix(selection)
            base.train(was_training)
        per_layer = [states[0].float().cpu() for layer in cache.layers for states in (layer.keys, layer.values)]
        key_values = torch.stack(per_layer).permute(2, 0, 1, 3)
        # The tokens stood at 0, 1, ...; the ones to come start at 0 again.
        encoder.set_key_values(rotate_prefix_keys(key_values, -encoder.pre_seq_len, base.config))
        base._selection_count += 1

    def active_prefix(self, batch: int, device: torch.device, dtype: torch.dtype) -> ActivePrefix | None:
        """The selected prefix for a batch of so many rows, in the activations' dtype; None for the plain base."""
        base = self.base_model
        selection = base._selection
        if selection is None:
            return None
        if isinstance(selection, tuple):
            return self._rows(repeat_rows(selection, batch), device, dtype)
        if selection == TRAINABLE_PREFIX and self._trainable is not None:
            key_values = self._trainable.key_values().to(device, dtype)
            key_values = key_values.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1)
            # Expanded first: every row draws its own dropout, as in the official code.
            dropped = torch.nn.functional.dropout(key_values, base.config.prefix_dropout, base.training)
            return ActivePrefix(dropped)
        return ActivePrefix(base._bank.one(selection, device, dtype).expand(-1, batch, -1, -1, -1))

    def _rows(self, names: Sequence[str | None], device: torch.device, dtype: torch.dtype) -> ActivePrefix | None:
        bank = self.base_model._bank
        if TRAINABLE_PREFIX in names and self._trainable is not None:
            bank = copy(bank)
            bank.add(TRAINABLE_PREFIX, self._trainable.key_values())
        return bank.rows(names, device, dtype)

    def check_cache_owner(self, cache: Cache) -> None:
        """Marks an empty cache as filled under the selected prefix; refuses one filled under another.

        Raises:
            ValueError: if the cached tokens have seen another prefix.
        """
        if torch.compiler.is_compiling():
            return
        base = self.base_model
        owner = (base._selection, base._selection_count if base._selection is not None else 0)
        if int(cache.get_seq_length()) == 0:
            cache.prefix_owner = owner
        elif getattr(cache, "prefix_owner", owner) != owner:
            raise ValueError(
                f"This cache was filled under prefix {cache.prefix_owner[0]!r}, the selected one is "
                f"{base._selection!r}: cached keys and values belong to one prefix. Start with an empty cache."
            )

    def check_prefix_is_trained(self) -> None:
        """Refuses inference with a trainable prefix that still has its random first values.

        Raises:
            ValueError: in that case.
        """
        selection = self.selected_prefix
        selected = selection if isinstance(selection, tuple) else (selection,)
        if TRAINABLE_PREFIX in selected and self._trainable is not None and self._trainable.is_untrained:
            raise ValueError(
                f"The prefix of pre_seq_len={self._trainable.pre_seq_len} is untrained: its values are random. Load a "
                "trained one by load_prefix(path), or use the plain base by set_prefix(None)."
            )

    def _check_base(self, checkpoint: PrefixCheckpoint) -> None:
        recorded = checkpoint.metadata.base_fingerprint
        if recorded is None:
            logger.warning(
                f"{checkpoint.source} does not say which base it was trained on: only its sizes could be checked."
            )
            return
        base = self.base_model
        what = difference(recorded, fingerprint_of(base.config, dict(base.named_parameters())))
        if what is not None:
            raise ValueError(
                f"{checkpoint.source} was trained on another base: on {checkpoint.metadata.base_model_name}, and this "
                f"one is {base.config.name_or_path or 'unnamed'} ({what})."
            )

    def _encoder_from(self, checkpoint: PrefixCheckpoint) -> PrefixEncoder:
        """The checkpoint as an encoder on the CPU, its keys in this kit's convention of positions."""
        config = copy(self.base_model.config)
        config.pre_seq_len = checkpoint.metadata.pre_seq_len
        config.prefix_projection = checkpoint.metadata.prefix_projection
        encoder = PrefixEncoder(config)
        try:
            encoder.load_state_dict(checkpoint.parameters)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint.source} is not a whole prefix: {error}") from error
        if checkpoint.positions_follow_prefix:
            moved = rotate_prefix_keys(encoder.key_values().detach(), -encoder.pre_seq_len, config)
            encoder.set_key_values(moved)
        return encoder

    def _replace_trainable(self, encoder: PrefixEncoder, checkpoint: PrefixCheckpoint) -> None:
        base = self.base_model
        before = base.prefix_encoder
        if (before.pre_seq_len, before.prefix_projection) == (encoder.pre_seq_len, encoder.prefix_projection):
            before.load_state_dict(encoder.state_dict())
            return
        logger.warning(
            f"The trainable prefix takes its size from {checkpoint.source}: pre_seq_len {encoder.pre_seq_len}, "
            f"prefix_projection {encoder.prefix_projection} (was {before.pre_seq_len}, {before.prefix_projection})."
        )
        base.config.pre_seq_len = encoder.pre_seq_len
        base.config.prefix_projection = encoder.prefix_projection
        base.prefix_encoder = encoder.to(before.embedding.weight.device)

    def _heads(self) -> dict[str, torch.Tensor]:
        """Parameters trained beside the prefix, by their full names."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("transformer.")} if (
            self is not self.base_model
        ) else {}

    def _load_heads(self, checkpoint: PrefixCheckpoint) -> None:
        if checkpoint.heads and self is not self.base_model:
            self.load_state_dict(checkpoint.heads, strict=False)
