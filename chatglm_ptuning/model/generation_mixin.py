"""transformers' `generate` with a prefix as one of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.masking_utils import create_masks_for_generate

from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch


class PrefixGenerationMixin(GenerationMixin):
    """Passes the prefix through all modes of `generate` to every forward pass."""

    def generate(self, *args: Any, prefix: PrefixArgument = None, **kwargs: Any) -> Any:
        """As in transformers, with a prefix.

        Args:
            prefix: as for the forward pass, for the rows of the input; the beams and returned sequences of a row share
                its prefix.

        Raises:
            KeyError: if a prefix of that name is not loaded.
            TypeError: if a tokenizer's result is given as the ids.
            ValueError: if the prefix is untrained, for another number of rows, or the cache is paged.
        """
        for given in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs")):
            if isinstance(given, Mapping):
                raise TypeError(
                    "generate got a tokenizer's result in place of its ids. Use generate(**result), or "
                    "return_dict=False in apply_chat_template, which returns the ids alone."
                )
        with torch.no_grad():
            prefix = self.resolve_prefix(prefix).by_row()
        self.check_prefix_is_trained(prefix)
        if prefix.length and kwargs.get("cache_implementation") == "paged":
            raise ValueError("cache_implementation 'paged' does not support a prefix. Use another cache.")
        return super().generate(*args, prefix=prefix, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, prefix: PrefixBatch | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; the prefix of a row goes to all of its beams and candidates."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if prefix is not None:
            inputs["prefix"] = prefix.for_rows(input_ids.shape[0])
        return inputs

    def create_masks_for_generate(
        self, config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> Callable | torch.Tensor | None:
        """Called by `generate` to prepare the mask over the tokens, which the compiled forward pass extends.

        A BlockMask cannot be extended to the prefix, so the forward pass makes all of it.
        """
        if config._attn_implementation == "flex_attention":
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        # Classifier-free guidance calls the model without the prompt; this call needs the prefix, too.
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        prefix = (model_kwargs or {}).get("prefix")
        for processor in processors:
            if prefix is not None and isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(self._call_with_prefix, prefix)
        return processors

    def _call_with_prefix(self, prefix: PrefixBatch, input_ids: torch.LongTensor, **inputs: Any) -> Any:
        return self(input_ids, prefix=prefix.for_rows(input_ids.shape[0]), **inputs)

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # An assistant model gets all arguments of this one, except the prefix, which belongs to this model.
        own = {name: value for name, value in model_kwargs.items() if name != "prefix"}
        return super()._get_candidate_generator(*args, model_kwargs=own, **kwargs)
