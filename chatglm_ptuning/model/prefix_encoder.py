"""The trainable prefix of P-Tuning v2: keys and values in front of every layer."""

from __future__ import annotations

from copy import copy

import torch
from torch import nn

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.trained_module import FirstValues, Float32Module
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint


class PrefixEncoder(Float32Module, FirstValues):
    """Computes the keys and values of `pre_seq_len` virtual tokens for every layer.

    Without projection it is a table `embedding` `[pre_seq_len, kv_size]`, where
    `kv_size = num_layers * 2 * multi_query_group_num * kv_channels`. With projection, the table goes through
    `Linear(kv_size, hidden_size) -> tanh -> Linear(hidden_size, kv_size)` (`trans.0`, `trans.2`). Parameter names,
    shapes and results are those of the official ChatGLM2-6B code (`modeling_chatglm.py`, class PrefixEncoder).

    The parameters stay in float32 for a base of any dtype, also after `model.half()` and `model.to(dtype)`.

    Raises:
        ValueError: if `config.pre_seq_len` is None or 0.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        if not config.pre_seq_len:
            raise ValueError(f"PrefixEncoder needs pre_seq_len of at least 1, got {config.pre_seq_len!r}.")
        self.pre_seq_len = config.pre_seq_len
        self.prefix_projection = config.prefix_projection
        self.kv_shape = config.prefix_shape.per_token
        kv_size = config.prefix_shape.kv_size
        self.embedding = nn.Embedding(self.pre_seq_len, kv_size, dtype=torch.float32)
        if self.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(kv_size, config.hidden_size, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(config.hidden_size, kv_size, dtype=torch.float32),
            )

    def forward(self, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the prefix in float32, `[pre_seq_len, kv_size]`.

        Autocast is off: a prefix that is rounded to 16 bits learns badly.

        Args:
            prefix: indices of virtual tokens, int64 `[...]`, for a result of `[..., kv_size]` as in the official code.
        """
        if prefix is None:
            prefix = torch.arange(self.pre_seq_len, device=self.embedding.weight.device)
        with torch.autocast(prefix.device.type, enabled=False):
            # Through the modules, not their weights: ZeRO-3 gathers a weight when its module is called.
            table = self.embedding(prefix)
            return self.trans(table) if self.prefix_projection else table

    def key_values(self) -> torch.Tensor:
        """The prefix as `[pre_seq_len, num_layers * 2, groups, kv_channels]`, float32.

        Layer `l` takes slice `2 * l` of the second axis as keys and `2 * l + 1` as values.
        """
        return self().view(self.pre_seq_len, *self.kv_shape)

    def saved_parameters(self) -> dict[str, torch.Tensor]:
        """The content of a prefix checkpoint: all parameters by their names."""
        return self.state_dict()

    @torch.no_grad()
    def set_key_values(self, key_values: torch.Tensor) -> None:
        """Sets the parameters so that `key_values()` returns `key_values`.

        With projection the first linear layer keeps its random weights, and the second is solved for; this is exact
        while `pre_seq_len <= hidden_size`, otherwise a least-squares fit.

        Args:
            key_values: `[pre_seq_len, num_layers * 2, groups, kv_channels]`.

        Raises:
            ValueError: if the shape differs.
        """
        expected = (self.pre_seq_len, *self.kv_shape)
        if tuple(key_values.shape) != expected:
            raise ValueError(f"The prefix has shape {expected}, the given keys and values {tuple(key_values.shape)}.")
        flat = key_values.reshape(self.pre_seq_len, -1).to(self.embedding.weight)
        if not self.prefix_projection:
            self.embedding.weight.copy_(flat)
            return
        mean = flat.mean(0)
        hidden = torch.tanh(self.trans[0](self.embedding.weight))
        solution = torch.linalg.lstsq(hidden.cpu().double(), (flat - mean).cpu().double(), driver="gelsd").solution
        self.trans[2].weight.copy_(solution.T)
        self.trans[2].bias.copy_(mean)


def encoder_of(checkpoint: PrefixCheckpoint, config: ChatGLMConfig) -> PrefixEncoder:
    """A prefix checkpoint as an encoder on the CPU. Draws no random numbers: a base with a prefix trains like any.

    Args:
        config: of the base.

    Raises:
        ValueError: naming the file, if the prefix is not complete.
    """
    config = copy(config)
    config.pre_seq_len = checkpoint.metadata.pre_seq_len
    config.prefix_projection = checkpoint.metadata.prefix_projection
    with torch.device("meta"):
        encoder = PrefixEncoder(config)
    parameters = {name: value.to(torch.float32, copy=True) for name, value in checkpoint.parameters.items()}
    try:
        encoder.load_state_dict(parameters, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.source} is not a complete prefix: {error}") from error
    return encoder
