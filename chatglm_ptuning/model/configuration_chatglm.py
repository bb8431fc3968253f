"""The configuration of a ChatGLM model and of the prefix in front of it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from chatglm_ptuning.files import check_json_files
from chatglm_ptuning.model.checkpoint_formats import (
    ROPE_BASE,
    check_architecture,
    check_not_quantised,
    checked_dtype,
    official_fields,
    without_recorded_prefix,
)
from chatglm_ptuning.prefix.shape import PrefixShape


class ChatGLMConfig(PreTrainedConfig):
    """Configuration of ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2-6B, GLM-4-9B and CodeGeeX4-ALL-9B, with the official names.

    An official `config.json` is accepted unchanged; one of transformers' GlmForCausalLM (`model_type: glm`) is
    converted. The fields of P-Tuning v2:

    - `pre_seq_len`: number of virtual tokens in front of every layer; None or 0 for no trainable prefix. It is never
      taken from a folder's `config.json`, where the official code leaves that of an earlier training: whoever wants a
      trainable prefix passes it.
    - `prefix_projection`: whether the prefix is the output of a two-layer MLP (Li & Liang 2021, section 4.3) instead
      of a plain table (P-Tuning v2, Liu et al. 2022, section 3.3).
    - `multi_query_group_num`: number of key/value groups; the prefix holds one key and one value per group.

    - `prefix_dropout`: dropout on the prefix's keys and values in training mode (official: 0.1).

    `quantization_bit` of 4 or 8 means official quantised weight files. Loading de-quantises them; `quantization_bit`
    is then 0 and `dequantized_from_bit` has the number.

    `position_interpolation` is whether `rope_ratio` divides the positions (ChatGLM2-6B-32K, which is recognised by
    its name) or multiplies the rotary base (all others). Saved configurations record it.

    Raises:
        ValueError: for sizes that do not fit together and for an unknown dtype, naming the fields and their values;
            for a configuration of another architecture (the first ChatGLM-6B, GLM-4-0414, GLM-4.5, GLM-4V, ...),
            naming a base to use instead.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
    }

    num_layers: int = 28
    padded_vocab_size: int | None = None  # from `vocab_size`, else 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float = 0.0
    classifier_dropout: float | None = None
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    bias_dropout_fusion: bool = True
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    fp32_residual_connection: bool = False
    original_rope: bool = True
    rope_ratio: float = 1.0
    position_interpolation: bool = False
    quantization_bit: int = 0
    dequantized_from_bit: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prefix_dropout: float = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        check_architecture(kwargs)
        # The official files have both; in some of them `vocab_size` is without the padding of the weights.
        vocab_size = kwargs.pop("vocab_size", None)
        if self.padded_vocab_size is None:
            self.padded_vocab_size = 65024 if vocab_size is None else vocab_size
        key_value_heads = kwargs.pop("num_key_value_heads", None)
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = checked_dtype(torch_dtype if self.dtype is None else self.dtype, "dtype")
        self.dtype = None if dtype == "auto" else dtype
        super().__post_init__(**kwargs)
        self.validate_sizes()
        if key_value_heads not in (None, self.num_key_value_heads):
            raise ValueError(
                f"num_key_value_heads ({key_value_heads}) contradicts multi_query_attention="
                f"{self.multi_query_attention}, multi_query_group_num={self.multi_query_group_num}, "
                f"num_attention_heads={self.num_attention_heads}."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, with the official names.

        Raises:
            ValueError: if the configuration is of another architecture or of weights that were saved quantised, or the
                file is damaged.
        """
        path = Path(pretrained_model_name_or_path)
        check_json_files(path, "config.json")
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        source = str(path / "config.json" if path.is_dir() else path)
        fields = official_fields(fields, source, str(path))
        check_not_quantised(fields, source)
        return without_recorded_prefix(fields, kwargs.get("pre_seq_len")), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, from a dictionary in the official format or in that of GlmConfig.

        Raises:
            ValueError: if the configuration is of another architecture.
        """
        name = str(kwargs.get("name_or_path", ""))
        fields = official_fields(config_dict, name or "This", name)
        if "name_or_path" in kwargs:  # by AutoConfig, which reads the file of a folder itself
            check_not_quantised(fields, name)
            fields = without_recorded_prefix(fields, kwargs.get("pre_seq_len"))
        return super().from_dict(fields, **kwargs)

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads: the groups, or all heads without multi-query attention."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies."""
        return ROPE_BASE * (1.0 if self.position_interpolation else self.rope_ratio)

    @property
    def position_scale(self) -> float:
        """Divides positions before the rotation."""
        return self.rope_ratio if self.position_interpolation else 1.0

    @property
    def prefix_shape(self) -> PrefixShape:
        """The sizes that a prefix of this base has to fit.

        Raises:
            ValueError: if the base cannot have one, naming the fields and their values.
        """
        if self.multi_query_group_num != self.num_key_value_heads:
            raise ValueError(
                f"With multi_query_attention=False a prefix needs multi_query_group_num ({self.multi_query_group_num}) "
                f"equal to num_attention_heads ({self.num_attention_heads}); pre_seq_len is {self.pre_seq_len}."
            )
        return PrefixShape(
            self.num_layers, self.multi_query_group_num, self.kv_channels, self.rope_base, self.position_scale
        )

    def validate_sizes(self) -> None:
        """Checks that the sizes fit together.

        Called on creation, and again by the model, since fields may change in between.

        Raises:
            ValueError: naming the fields and their values.
        """
        for name in ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels",
                     "num_attention_heads", "multi_query_group_num", "seq_length"):  # fmt: skip
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if self.kv_channels % 4:
            raise ValueError(
                f"kv_channels must be a multiple of 4 (half of each head is rotated, in pairs), got {self.kv_channels}."
            )
        if self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"multi_query_group_num ({self.multi_query_group_num})."
            )
        for name in ("rope_ratio", "layernorm_epsilon"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        for name in ("hidden_dropout", "attention_dropout", "prefix_dropout", "classifier_dropout"):
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 up to but not including 1, got {value!r}.")
        if self.pre_seq_len is not None and (not _is_int(self.pre_seq_len) or self.pre_seq_len < 0):
            raise ValueError(f"pre_seq_len must be None or an integer from 0 on, got {self.pre_seq_len!r}.")
        if not isinstance(self.prefix_projection, bool):
            raise ValueError(f"prefix_projection must be true or false, got {self.prefix_projection!r}.")
        if self.prefix_projection and not self.pre_seq_len:
            raise ValueError(f"prefix_projection=True needs pre_seq_len of at least 1, got {self.pre_seq_len!r}.")
        if self.pre_seq_len:
            _ = self.prefix_shape  # raises if the base cannot have a prefix


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
