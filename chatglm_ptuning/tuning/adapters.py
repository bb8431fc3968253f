"""Tuning methods of PEFT: LoRA, prompt tuning and P-Tuning; every checkpoint holds an adapter that PEFT reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from chatglm_ptuning.files import read_tensors
from chatglm_ptuning.model.virtual_tokens import VirtualTokens
from chatglm_ptuning.prefix.bank import TRAINABLE_PREFIX
from chatglm_ptuning.prefix.batch import PrefixBatch
from chatglm_ptuning.prefix.formats import read_prefix
from chatglm_ptuning.tuning.methods import LoraSettings, PromptSettings
from chatglm_ptuning.tuning.record import read_record, write_together
from chatglm_ptuning.tuning.tuning import Tuning, check_sizes, heads_of, on_cpu, set_heads

if TYPE_CHECKING:
    from peft import PeftConfig, PromptLearningConfig

logger = logging.get_logger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
ENCODER_FILE = "prompt_encoder.safetensors"
"""The parameters of the prompt encoder, to resume from them: PEFT's adapter holds only the embeddings they give."""


def _require_peft(method: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"The tuning method {method} needs PEFT: pip install peft.") from error


class LoraTuning(Tuning):
    """Low-rank update matrices beside linear layers (Hu et al. 2021), inserted into the model, and the linear head.

    Args:
        settings: of the matrices, or a PEFT configuration read from an adapter.

    Raises:
        ValueError: if the settings are out of range, or name a layer that does not exist.
    """

    method = "lora"

    def __init__(self, model: PreTrainedModel, settings: LoraSettings | PeftConfig) -> None:
        _require_peft(self.method)
        from peft import LoraConfig, TaskType, get_peft_model
        from peft.utils import ModulesToSaveWrapper

        super().__init__(model)
        if isinstance(settings, LoraSettings):
            heads = sorted({name.partition(".")[0] for name in self.heads()})
            settings = LoraConfig(
                task_type=None if heads else TaskType.CAUSAL_LM,
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=list(settings.targets),
                modules_to_save=heads or None,
            )
        self.config = settings
        model.requires_grad_(False)
        self.adapter = get_peft_model(model, settings)
        self._head_wrappers = [part for part in self.adapter.modules() if isinstance(part, ModulesToSaveWrapper)]
        for wrapper in self._head_wrappers:
            # PEFT trains a copy of the head; the original is neither trained nor used.
            wrapper.original_module.mark_set()

    @classmethod
    def of_adapter(cls, model: PreTrainedModel, folder: Path) -> LoraTuning:
        """Restores an adapter of this kit or of PEFT.

        Raises:
            FileNotFoundError, ValueError: if it is missing or damaged, or does not fit the base.
        """
        _require_peft(cls.method)
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        tuning = cls(model, config)
        if read_record(folder) is None:
            logger.warning(f"{folder} does not say which base it was trained on: only its sizes could be checked.")
            tuning.load_adapter(folder)
        else:
            tuning.load(folder)
        model.eval()
        return tuning

    def settings(self) -> dict[str, Any]:
        """As `Tuning.settings`."""
        config = self.config
        return {
            "rank": config.r,
            "alpha": config.lora_alpha,
            "dropout": config.lora_dropout,
            "targets": sorted(config.target_modules),
        }

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """As `Tuning.save`: PEFT's adapter with the head, and the record."""
        with write_together(folder, self.record(details)) as place:
            self.adapter.save_pretrained(place, save_embedding_layers=False)
            (place / "README.md").unlink(missing_ok=True)  # an empty model card

    def load(self, folder: Path) -> None:
        """As `Tuning.load`."""
        self.checked_record(folder)
        self.load_adapter(folder)

    def load_adapter(self, folder: Path) -> None:
        """Loads the weights of an adapter, of this kit or not.

        Raises:
            FileNotFoundError, ValueError: if they are missing or damaged, or do not fit.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        tensors = read_tensors(folder / ADAPTER_FILE)
        expected = get_peft_model_state_dict(self.adapter, save_embedding_layers=False)
        check_sizes(folder / ADAPTER_FILE, tensors, expected, f"{type(self.model).__name__} with this LoRA")
        set_peft_model_state_dict(self.adapter, tensors)

    @contextmanager
    def plain_base(self) -> Iterator[None]:
        """As `Tuning.plain_base`: with the matrices disabled."""
        with self.adapter.disable_adapter():
            for wrapper in self._head_wrappers:
                wrapper.enable_adapters(True)  # PEFT disables the trained head as well
            yield None


class PromptTuning(Tuning):
    """Trained embeddings in front of the input: a table (Lester et al. 2021, `prompt`) or the result of an MLP or LSTM
    (Liu et al. 2021, `p_tuning`), and the linear head.

    They are trained as the prefix that they are equivalent to (`VirtualTokens`). A checkpoint is a prefix checkpoint
    with PEFT's adapter beside it.

    Args:
        method: `prompt` or `p_tuning`.
        first_ids: for `prompt`, tokens whose embeddings it starts from, int64 `[pre_seq_len]`; None for N(0, 1).
    """

    def __init__(
        self, model: PreTrainedModel, method: str, settings: PromptSettings, first_ids: torch.Tensor | None = None
    ) -> None:
        _require_peft(method)
        from peft import PromptEmbedding, PromptEncoder

        super().__init__(model)
        self.method, self.prompt_settings = method, settings
        base, config = model.base_model, _prompt_config(model, method, settings)
        self.config = config
        encoder = (
            PromptEmbedding(config, base.embedding.word_embeddings) if method == "prompt" else PromptEncoder(config)
        )
        if first_ids is not None:
            with torch.no_grad():
                encoder.embedding.weight.copy_(base.embedding(first_ids.to(base.device)))
        model.requires_grad_(False)
        base.prefix_encoder = VirtualTokens(encoder, settings.pre_seq_len, base).to(base.device)
        base.config.prefix_dropout = 0.0  # keys and values are not trained
        model.set_prefix(TRAINABLE_PREFIX)
        model.freeze_base()
        for parameter in self.heads().values():
            parameter.requires_grad_(True)

    @property
    def tokens(self) -> VirtualTokens:
        """The virtual tokens in front of the input."""
        return self.model.base_model.prefix_encoder

    def settings(self) -> dict[str, Any]:
        """As `Tuning.settings`."""
        return asdict(self.prompt_settings)

    def save(self, folder: Path, details: dict[str, Any]) -> None:
        """As `Tuning.save`: the equivalent prefix with the head, PEFT's adapter, and the record."""
        with write_together(folder, self.record(details)) as place:
            self.model.save_prefix(place, **details)
            with torch.no_grad():
                embeddings = {"prompt_embeddings": self.tokens()}
            save_file(on_cpu(embeddings), place / ADAPTER_FILE, metadata={"format": "pt"})
            save_file(on_cpu(self.tokens.prompt_encoder.state_dict()), place / ENCODER_FILE, metadata={"format": "pt"})
            inference, self.config.inference_mode = self.config.inference_mode, True
            self.config.save_pretrained(place)
            self.config.inference_mode = inference

    def load(self, folder: Path) -> None:
        """As `Tuning.load`; the sizes must match the settings."""
        self.checked_record(folder)
        try:
            self.tokens.prompt_encoder.load_state_dict(read_tensors(folder / ENCODER_FILE))
        except RuntimeError as error:
            raise ValueError(f"{folder / ENCODER_FILE} does not fit the settings of this run: {error}") from error
        set_heads(self.model, read_prefix(folder, self.model.config.prefix_shape).heads, folder)

    @contextmanager
    def plain_base(self) -> Iterator[PrefixBatch]:
        """As `Tuning.plain_base`: no prefix."""
        yield self.model.prefix_batch(None)


def _prompt_config(model: PreTrainedModel, method: str, settings: PromptSettings) -> PromptLearningConfig:
    from peft import PromptEncoderConfig, PromptTuningConfig, TaskType

    config = model.config
    shared = {
        # PEFT's classes for other heads are for encoders, which count virtual positions as those of the input.
        "task_type": None if heads_of(model) else TaskType.CAUSAL_LM,
        "num_virtual_tokens": settings.pre_seq_len,
        "token_dim": config.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "base_model_name_or_path": config.name_or_path,
    }
    if method == "prompt":
        return PromptTuningConfig(prompt_tuning_init="RANDOM", **shared)
    hidden = settings.encoder_hidden_size or config.hidden_size
    return PromptEncoderConfig(
        encoder_reparameterization_type=settings.encoder.upper(), encoder_hidden_size=hidden, **shared
    )
