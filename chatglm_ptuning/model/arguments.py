"""Flags about the base model, for every command that uses one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.hub import HubName, find_base
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
from chatglm_ptuning.model.quantization import QuantizationType
from chatglm_ptuning.model.stored_prefix import name_of_base
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

DEFAULT_MODEL = str(Path(__file__).resolve().parents[2] / "data" / "chatglm-nano")
"""The base model that is bundled with the sources."""
PLAIN_BASE = "none"
"""Names the plain base in place of a prefix, in every command."""


def is_plain_base(named: str | None) -> bool:
    """Whether a value of a flag names the plain base."""
    return named is not None and named.lower() == PLAIN_BASE


@dataclass
class TokenizerArguments:
    """The base model whose tokenizer a command uses."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={"help": "folder of the base model, or its hub name (default: the bundled nano)"},
    )
    hub: HubName = field(default="huggingface", metadata={"help": "where a hub name is looked up"})
    revision: str | None = field(
        default=None,
        metadata={"help": "branch, tag or commit of a hub name (default: main)", "aliases": ["--model_revision"]},
    )

    def load_config(self) -> ChatGLMConfig:
        """The configuration of the base, without its weights; errors as `find_base`."""
        folder = find_base(self.model_name_or_path, self.hub, self.revision, weights=False)
        return ChatGLMConfig.from_pretrained(folder)

    def find_prefix(self, named: str) -> str:
        """The path of a prefix that a flag names: the name of the base means the prefix in the base's own folder.

        Raises:
            FileNotFoundError, ConnectionError, ImportError: as `find_base`.
        """
        base = self.model_name_or_path
        if Path(named).exists() or named not in (base, name_of_base(Path(base))):
            return named
        return str(find_base(base, self.hub, self.revision))

    def load_tokenizer(self) -> ChatGLMTokenizer:
        """As `loading.load_tokenizer`."""
        return load_tokenizer(self.model_name_or_path, hub=self.hub, revision=self.revision)


@dataclass
class BaseArguments(TokenizerArguments):
    """The base model that a command uses."""

    quantization_bit: Literal[0, 4, 8] | None = field(
        default=None, metadata={"help": "quantise the base model to 4 or 8 bits (bitsandbytes)"}
    )
    quantization_type: QuantizationType = field(default="nf4", metadata={"help": "type of the 4-bit numbers"})

    def load_model(self, **settings: Any) -> ChatGLMPreTrainedModel:
        """As `loading.load_model`.

        Args:
            settings: further arguments of `loading.load_model`.
        """
        return load_model(
            self.model_name_or_path,
            hub=self.hub,
            revision=self.revision,
            quantization_bit=self.quantization_bit,
            quantization_type=self.quantization_type,
            **settings,
        )


@dataclass
class InferenceBaseArguments(BaseArguments):
    """The base model of a command that does not train."""

    device_map: Literal["auto"] | None = field(
        default=None,
        metadata={"help": "auto: spread the base over all GPUs, then the CPU's memory and the disk "
                          "(default: one device)"},
    )  # fmt: skip

    def load_model(self, **settings: Any) -> ChatGLMPreTrainedModel:
        """As `BaseArguments.load_model`, on the devices of --device_map."""
        return super().load_model(device_map=self.device_map, **settings)
