"""Predictions of a loaded model for the heads of tasks, in batches, shared by several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.report import too_long_for_base
from chatglm_ptuning.data.tasks.examples import Example
from chatglm_ptuning.data.tasks.heads.head import Head, Prediction
from chatglm_ptuning.evaluation.batches import evaluating, in_batches
from chatglm_ptuning.evaluation.candidates import score_candidates
from chatglm_ptuning.evaluation.generate import generate_answers
from chatglm_ptuning.evaluation.parallel import do_together, is_first_process
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
    from chatglm_ptuning.tuning.tuning import Tuning


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class InferenceSettings:
    """How a model is run; only `max_new_tokens` and `num_beams` change the predictions."""

    batch_size: int = 8
    max_new_tokens: int = 128
    num_beams: int = 1


def predict(
    model: ChatGLMPreTrainedModel,
    head: Head,
    examples: Sequence[Example],
    settings: InferenceSettings,
    prefix: PrefixArgument = None,
    *,
    under_engine: bool = False,
) -> list[Prediction]:
    """Predictions in the order of the examples.

    Several processes share the examples, and all get all predictions.

    Args:
        model: of the head's class.
        prefix: as for a forward pass, one for all examples; by default the selected one.
        under_engine: whether a DeepSpeed engine manages the model (after training).

    Raises:
        ValueError: if a prompt is too long for `max_source_length`, or the prefix is untrained.
    """

    def work(share: Sequence[Example]) -> list[Prediction]:
        with torch.no_grad():
            used = model.resolve_prefix(prefix)
        model.check_prefix_is_trained(used)
        return head.predict(share, ModelInference(model, head.tokenizer, settings, used))

    return do_together(examples, work, model, under_engine)


def predict_beside_base(
    tuned: Tuning,
    name: str,
    head: Head,
    examples: Sequence[Example],
    settings: InferenceSettings,
    *,
    with_base: bool,
    under_engine: bool = False,
) -> dict[str, list[Prediction]]:
    """As `predict`, under the key `name`; before it, if `with_base`, of the plain base under the key `base`."""
    found = {}
    if with_base:
        with tuned.plain_base() as prefix:
            found["base"] = predict(tuned.model, head, examples, settings, prefix, under_engine=under_engine)
    found[name] = predict(tuned.model, head, examples, settings, under_engine=under_engine)
    return found


@dataclass(frozen=True)
class ModelInference:
    """A model with the interface that heads use (`heads.head.Inference`)."""

    model: ChatGLMPreTrainedModel
    tokenizer: ChatGLMTokenizer
    settings: InferenceSettings
    prefix: PrefixBatch

    def outputs(self, rows: Sequence[Sequence[int]], what: str) -> Iterator[tuple[list[int], Any]]:
        """As `Inference.outputs`."""
        self._warn_of_long(rows)
        collate = PaddingCollator(self.tokenizer.pad_token_id, "right")
        with torch.no_grad(), evaluating(self.model):
            for places in in_batches(self.model, rows, self.settings.batch_size, what, is_first_process()):
                batch = collate([{"input_ids": rows[place]} for place in places])
                inputs = {name: value.to(self.model.device) for name, value in batch.items()}
                yield places, self.model(**inputs, use_cache=False, prefix=self.prefix)

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[torch.Tensor]:
        """As `Inference.log_likelihoods`."""
        self._warn_of_long(prompts)
        return score_candidates(
            self.model,
            prompts,
            candidates,
            batch_size=self.settings.batch_size,
            prefix=self.prefix,
            progress=is_first_process(),
        )

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """As `Inference.answers`."""
        self._warn_of_long(prompts)
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            batch_size=self.settings.batch_size,
            max_new_tokens=self.settings.max_new_tokens,
            num_beams=self.settings.num_beams,
            prefix=self.prefix,
            progress=is_first_process(),
        )

    def _warn_of_long(self, rows: Sequence[Sequence[int]]) -> None:
        too_long = too_long_for_base([len(row) for row in rows], self.model.config.seq_length, "prompts")
        if too_long and is_first_process():
            logger.warning_once(too_long)  # a run predicts the same rows after every epoch, and with the plain base
