"""Linear heads for labels of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from chatglm_ptuning.data.encoding import EncodedExample
from chatglm_ptuning.data.tasks.examples import Example, MultiLabelExample, TextExample
from chatglm_ptuning.data.tasks.heads.head import Inference, Prediction, PromptHead
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.model.modeling_heads import ChatGLMForSequenceClassification


class SequenceClassification(PromptHead):
    """A linear head on the last token before the answer's text."""

    name = "sequence_classification"
    solves = (TextExample,)
    model_class = ChatGLMForSequenceClassification

    @staticmethod
    def outputs(task: Task) -> list[str]:
        """The labels."""
        return list(task.labels)

    def encode(self, example: TextExample) -> EncodedExample:
        ids, source = self._fitting_prompt(example)
        row = {"input_ids": ids, "labels": self._learned(example)}
        return EncodedExample([row], ["source_cut"] * (source > len(ids)), [(source, 0)])

    def predict(self, examples: Sequence[TextExample], model: Inference) -> list[Prediction]:
        predictions: list[Prediction] = [Prediction(None)] * len(examples)
        for places, output in model.outputs([self.prompt_ids(example) for example in examples], "classifying"):
            for place, logits in zip(places, output.logits.cpu(), strict=True):
                predictions[place] = self._read(logits)
        return predictions

    def _ids_of(self, example: Example) -> list[int]:
        return [*super()._ids_of(example), *self.tokenizer.chat.answer_header()]

    def _learned(self, example: TextExample) -> Any:
        """The index of the label."""
        return list(self.task.labels).index(example.label or "")

    def _read(self, logits: torch.Tensor) -> Prediction:
        """The label of the highest logit."""
        row = logits.softmax(-1)
        best = int(row.argmax())
        return Prediction(list(self.task.labels)[best], float(row[best]))


class MultiLabelClassification(SequenceClassification):
    """Any number of labels for each text."""

    smooths_labels = False
    solves = (MultiLabelExample,)

    @classmethod
    def model_settings(cls, task: Task) -> dict[str, Any]:
        return super().model_settings(task) | {"problem_type": "multi_label_classification"}

    def _learned(self, example: MultiLabelExample) -> list[float]:
        """0.0 or 1.0 for each label."""
        return [float(key in (example.labels or ())) for key in self.task.labels]

    def _read(self, logits: torch.Tensor) -> Prediction:
        """All labels whose sigmoid is above 0.5; the confidence assumes that labels are independent."""
        row = logits.sigmoid()
        chosen = [name for name, value in zip(self.task.labels, row.tolist(), strict=True) if value > 0.5]
        return Prediction(chosen, float(row.maximum(1 - row).prod()))
