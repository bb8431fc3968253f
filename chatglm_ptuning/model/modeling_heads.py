"""ChatGLM with a linear head: classification of sequences and tokens, and spans that answer a question.

With `pre_seq_len` the base is frozen, and the head is trained beside the prefix. Both stay in float32. `save_prefix`
and `load_prefix` keep them together: forward passes with a loaded prefix use its head instead of the module here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.losses import IGNORED_LABEL, cross_entropy, mean_loss
from chatglm_ptuning.model.modeling_chatglm import ChatGLMModel, ChatGLMPreTrainedModel
from chatglm_ptuning.model.packed_sequences import last_tokens, unpack
from chatglm_ptuning.model.placement import out_of_offload
from chatglm_ptuning.model.trained_module import FirstValues, Float32Module
from chatglm_ptuning.prefix.batch import PrefixArgument

_head_to_come: ContextVar[bool] = ContextVar("head_to_come", default=False)


@contextmanager
def head_to_come() -> Iterator[None]:
    """A context in which a base loads without a warning about its random head, which is trained or loaded later.

    `check_prefix_is_trained` refuses an untrained head.
    """
    token = _head_to_come.set(True)
    try:
        yield
    finally:
        _head_to_come.reset(token)


class Head(Float32Module, FirstValues, nn.Linear):
    """A linear layer with bias, in float32 and outside autocast."""

    def __init__(self, config: ChatGLMConfig, outputs: int) -> None:
        super().__init__(config.hidden_size, outputs, dtype=torch.float32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states `[..., hidden_size]` of any floating type -> float32 `[..., outputs]`."""
        return _linear_in_float32(hidden_states, self.weight, self.bias)


def _linear_in_float32(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return functional.linear(states.to(weight), weight, bias)  # a spread base may end on another device


class ChatGLMWithHead(ChatGLMPreTrainedModel):
    """A transformer with a linear head on its states.

    Args:
        config: with the number of outputs of the head.
        transformer: a loaded ChatGLMModel, which is not changed; by default a new one.
    """

    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["prefix_encoder", "classifier_head", "qa_outputs"]
    head_name = "classifier_head"

    def __init__(self, config: ChatGLMConfig, transformer: ChatGLMModel | None = None) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config) if transformer is None else transformer
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        setattr(self, self.head_name, Head(config, self._outputs()))
        if transformer is None:
            self.post_init()
        else:
            self._init_weights(getattr(self, self.head_name))

    def _outputs(self) -> int:
        return self.config.num_labels

    def _states(
        self, skip_logits: bool = False, supervised_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """The transformer's states. The Trainer's arguments against large logits change nothing: a head's are small."""
        return self.transformer(**kwargs)

    def _apply_head(self, states: torch.Tensor, prefix: PrefixArgument) -> torch.Tensor:
        """States `[..., hidden_size]` -> float32 `[..., outputs]`, with the head that belongs to the prefix."""
        states, key = self.dropout(states), self.head_key or self.head_name
        loaded = self._heads_of(prefix)
        if f"{key}.weight" in loaded:
            weight, bias = (loaded[f"{key}.{part}"].to(states.device) for part in ("weight", "bias"))
            return _linear_in_float32(states, weight, bias)
        return getattr(self, self.head_name)(states)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As `ChatGLMPreTrainedModel.from_pretrained`; a head is never offloaded with its base."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        head = getattr(model, cls.head_name)
        setattr(model, cls.head_name, out_of_offload(head, Head(model.config, head.out_features)))
        return (model, info) if output_loading_info else model

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if _head_to_come.get() or self.config.pre_seq_len:
            loading_info.missing_keys -= set(self._heads())


class ChatGLMForSequenceClassification(ChatGLMWithHead):
    """Classifies sequences by the state of their last real token, after the final norm.

    `config.num_labels` and `config.problem_type` set the task as in transformers. Without `problem_type`, one label
    means regression, integer labels a single class, and floating-point labels several classes at once. The head has
    the official name, `classifier_head`.
    """

    head_kind = "sequence_classification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        smoothing: float = 0.0,
        prefix: PrefixArgument = None,
        sequence_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """As `ChatGLMModel.forward`, with logits `[batch, num_labels]`, float32.

        Args:
            attention_mask: `[batch, seq_len]`, padded on either side. Without it, the `pad_token_id`s at the end of a
                row are padding.
            labels: `[batch]` classes or numbers, or `[batch, num_labels]` for several classes or numbers at once; -100
                where the loss is masked.
            num_items_in_batch: divides the loss, instead of the number of labels here.
            smoothing: of the labels, see `cross_entropy`; for labels of which a row has one.
            sequence_lengths: of the sequences of a packed row; each of them is then a row of the batch.

        Raises:
            ValueError: if a row has no real token, or labels of which a row has several are to be smoothed.
        """
        if sequence_lengths is not None:
            device = (input_ids if inputs_embeds is None else inputs_embeds).device
            kwargs["kept_positions"] = last_tokens(sequence_lengths, device)
        outputs = self._states(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            prefix=prefix,
            sequence_lengths=sequence_lengths,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if sequence_lengths is not None:
            pooled = hidden_states[0]
        else:
            last = self._last_real_position(input_ids, attention_mask, hidden_states)
            pooled = hidden_states[torch.arange(hidden_states.shape[0], device=last.device), last]
        logits = self._apply_head(pooled, prefix)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels.to(logits.device), num_items_in_batch, smoothing)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_real_position(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        batch, seq_len = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -seq_len:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            real = torch.ones(batch, seq_len, dtype=torch.bool)
        real = real.to(hidden_states.device)
        empty = (~real).all(-1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Rows {empty} of the batch have no real token to classify.")
        return (torch.arange(seq_len, device=real.device) * real).argmax(-1)

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        smoothing: float,
    ) -> torch.Tensor:
        problem = self.config.problem_type
        if problem is None and self.num_labels == 1:
            problem = "regression"
        elif problem is None:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if problem == "single_label_classification":
            return cross_entropy(logits, labels.reshape(-1), num_items_in_batch, smoothing)
        if smoothing:
            raise ValueError(
                f"smoothing is not defined for {problem}: its labels are not classes of which one is right."
            )
        labels = labels.reshape(logits.shape).to(logits.dtype)
        known = labels != IGNORED_LABEL
        if problem == "regression":
            losses = functional.mse_loss(logits, labels, reduction="none")
        else:
            losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        items = known.sum() if num_items_in_batch is None else num_items_in_batch
        return mean_loss((losses * known).sum(), items)


class ChatGLMForTokenClassification(ChatGLMWithHead):
    """Labels every token, for instance with its part of a named entity."""

    head_kind = "token_classification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        smoothing: float = 0.0,
        prefix: PrefixArgument = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As `ChatGLMModel.forward`, with logits `[batch, seq_len, num_labels]`, float32.

        Args:
            labels: `[batch, seq_len]`, -100 on tokens that have none.
            num_items_in_batch: divides the loss, instead of the number of labelled tokens here.
            smoothing: of the labels, see `cross_entropy`.
        """
        outputs = self._states(input_ids=input_ids, attention_mask=attention_mask, prefix=prefix, **kwargs)
        logits = self._apply_head(outputs.last_hidden_state, prefix)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch, smoothing)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ChatGLMForQuestionAnswering(ChatGLMWithHead):
    """Finds where in its input an answer starts and ends."""

    head_kind = "question_answering"
    head_name = "qa_outputs"

    def _outputs(self) -> int:
        return 2

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        prefix: PrefixArgument = None,
        sequence_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """As `ChatGLMModel.forward`, with `start_logits` and `end_logits` `[batch, seq_len]`, float32.

        Args:
            start_positions: `[batch]`; a position outside the row (a window without the answer) is masked.
            end_positions: likewise, of the answer's last token.
            num_items_in_batch: divides each loss, instead of the number of positions here.
            sequence_lengths: of the sequences of a packed row; each of them is then a row of the batch, padded on the
                right to the longest.
        """
        outputs = self._states(
            input_ids=input_ids,
            attention_mask=attention_mask,
            prefix=prefix,
            sequence_lengths=sequence_lengths,
            **kwargs,
        )
        logits = self._apply_head(outputs.last_hidden_state, prefix)
        if sequence_lengths is not None:
            logits, attention_mask = unpack(logits, sequence_lengths)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            # Padding is masked, so that the loss of a row does not depend on the length of others.
            starts, ends = (_on_real_tokens(logits, attention_mask) for logits in (start_logits, end_logits))
            start_loss = cross_entropy(starts, _inside(start_positions, starts), num_items_in_batch)
            end_loss = cross_entropy(ends, _inside(end_positions, ends), num_items_in_batch)
            loss = (start_loss + end_loss) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _on_real_tokens(logits: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The logits `[batch, seq_len]`, with the lowest number at padding."""
    if attention_mask is None or attention_mask.ndim != 2:
        return logits
    real = attention_mask[:, -logits.shape[1] :].bool().to(logits.device)
    return logits.masked_fill(~real, torch.finfo(logits.dtype).min)


def _inside(positions: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The positions `[batch]`, -100 where they lie outside the row."""
    positions = positions.reshape(-1).to(logits.device)
    return positions.masked_fill((positions < 0) | (positions >= logits.shape[1]), IGNORED_LABEL)
