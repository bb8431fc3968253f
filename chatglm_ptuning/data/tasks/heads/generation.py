"""Heads that are the language model itself: it writes the answer, or ranks candidate answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatglm_ptuning.data.encoding import EncodedExample
from chatglm_ptuning.data.tasks.examples import (
    ChoiceExample,
    Example,
    GenerationExample,
    QuestionExample,
    TextExample,
)
from chatglm_ptuning.data.tasks.heads.head import Inference, Prediction, PromptHead
from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration


class Generation(PromptHead):
    """The language model writes the answer, by beam or greedy search."""

    name = "generation"
    solves = (GenerationExample, QuestionExample)
    model_class = ChatGLMForConditionalGeneration

    def encode(self, example: Example) -> EncodedExample:
        """The text of the answer is learned; `labels` `[seq_len]` are -100 on the prompt."""
        prompt, source = self._fitting_prompt(example)
        answer = self.answer_ids(example.answer_text(self.task) or "")
        too_long = len(answer) > self.max_target_length + 1
        learned = answer[: self.max_target_length] if too_long else answer
        return EncodedExample(
            [{"input_ids": prompt + learned, "labels": [IGNORED_LABEL] * len(prompt) + learned}],
            ["source_cut"] * (source > len(prompt)) + ["target_cut"] * too_long,
            [(source, len(answer) - 1)],
        )

    def predict(self, examples: Sequence[Example], model: Inference) -> list[Prediction]:
        return [Prediction(answer) for answer in model.answers([self.prompt_ids(example) for example in examples])]


class CandidateScoring(Generation):
    """The answer is the candidate with the highest likelihood: a label's verbaliser, or one of the example's own."""

    solves = (TextExample, ChoiceExample)
    masks_candidates = True

    def predict(self, examples: Sequence[Example], model: Inference) -> list[Prediction]:
        prompts = [self.prompt_ids(example) for example in examples]
        candidates = self._candidates(examples)
        scores = model.log_likelihoods(prompts, candidates)
        if self.candidate_scores == "mean":
            lengths = [torch.tensor([len(ids) for ids in own]) for own in candidates]
            scores = [row / own for row, own in zip(scores, lengths, strict=True)]
        elif self.candidate_scores == "calibrated":  # pointwise mutual information, Holtzman et al. 2021, section 3.1
            neutral = self._neutral_scores(examples, candidates, model)
            scores = [row - own for row, own in zip(scores, neutral, strict=True)]
        predictions = []
        for example, row in zip(examples, scores, strict=True):
            best = int(row.argmax())
            value = list(example.candidate_answers(self.task))[best]
            predictions.append(Prediction(value, float(row.softmax(-1)[best])))
        return predictions

    def _candidates(self, examples: Sequence[Example]) -> list[list[list[int]]]:
        texts = [tuple(example.candidate_answers(self.task).values()) for example in examples]
        encoded = {own: [self.answer_ids(text) for text in own] for own in dict.fromkeys(texts)}
        return [encoded[own] for own in texts]

    def _neutral_scores(
        self, examples: Sequence[Example], candidates: Sequence[list[list[int]]], model: Inference
    ) -> list[torch.Tensor]:
        """Scores of the candidates after the prompt of an empty text; equal pairs of both are computed once."""
        prompts = [tuple(self.prompt_ids(example.shortened(0))) for example in examples]
        keys = [(prompt, id(own)) for prompt, own in zip(prompts, candidates, strict=True)]
        of_key = dict(zip(keys, candidates, strict=True))
        scores = model.log_likelihoods([prompt for prompt, _ in of_key], list(of_key.values()))
        found = dict(zip(of_key, scores, strict=True))
        return [found[key] for key in keys]


class MultipleChoice(CandidateScoring):
    """As `CandidateScoring`, by the name for tasks whose examples have their own candidates."""

    name = "multiple_choice"
    solves = (ChoiceExample,)
