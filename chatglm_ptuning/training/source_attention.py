"""Training with attention over the source that is not causal (`--source_attention bidirectional`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from chatglm_ptuning.data.collate import prompt_length, row_length
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
    from chatglm_ptuning.training.arguments import ModelArguments


def source_attention_of_base(flags: ModelArguments) -> dict[str, str]:
    """The field of ChatGLMConfig for a new prefix, or the base without one; a checkpoint brings its own."""
    if flags.source_attention is None or flags.ptuning_checkpoint is not None:
        return {}
    return {"source_attention": flags.source_attention}


def choose_source_attention(model: ChatGLMPreTrainedModel, flags: ModelArguments, trains: bool) -> None:
    """Lets --source_attention change how a prefix that was just loaded reads its source, if it is trained on.

    Raises:
        ValueError: if it is not, and the flag says otherwise than the checkpoint.
    """
    wanted, found = flags.source_attention, model.source_attention_of_row()
    if wanted in (None, found):
        return
    if not trains:
        raise ValueError(
            f"--source_attention is {wanted}, but the prefix in {flags.ptuning_checkpoint} was trained with {found}. "
            "Leave --source_attention out: it is read from the checkpoint."
        )
    model.config.source_attention = wanted


def source_of_rows(
    model: ChatGLMPreTrainedModel, tokenizer: ChatGLMTokenizer
) -> Callable[[Mapping[str, Any]], int] | None:
    """The `source_length` of the collator of a run: none if the selected prefix is causal."""
    if model.source_attention_of_row() == "causal":
        return None
    return prompt_length(tokenizer) if isinstance(model, ChatGLMForConditionalGeneration) else row_length
