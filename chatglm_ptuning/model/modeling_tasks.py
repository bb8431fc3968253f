"""One transformer and one prefix with the heads of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMPreTrainedModel
from chatglm_ptuning.model.modeling_heads import ChatGLMWithHead
from chatglm_ptuning.prefix.checkpoint import HEADS_KEY

_OF_LOADING = ("hf_device_map", "hf_quantizer", "is_quantized", "quantization_method")
"""Attributes of a loaded model that the Trainer reads."""


class ChatGLMForMultipleTasks(ChatGLMPreTrainedModel):
    """Solves several tasks with one prefix, each with its own head (MT-DNN, Liu et al. 2019, figure 1).

    Losses and outputs are those of the classes for a single task: `for_task` returns the model of a task, which shares
    the transformer, its prefix and the task's head with this one. A prefix checkpoint holds all heads, `heads.TASK.*`.

    Args:
        language_model: a loaded base; it solves the tasks without a linear head.
        heads: for every task by its name, `model_class` and the fields of its configuration (`id2label`, `label2id`,
            `problem_type`).

    Raises:
        ValueError: if a task's name cannot be part of a parameter's name.
    """

    def __init__(self, language_model: ChatGLMForConditionalGeneration, heads: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(language_model.config)
        self.transformer = language_model.transformer
        self.heads = nn.ModuleDict()
        self._of_task: dict[str, ChatGLMPreTrainedModel] = {}  # no submodules: all their parameters are here already
        for name, head in heads.items():
            model_class, config = head["model_class"], copy(self.config)
            if not issubclass(model_class, ChatGLMWithHead):
                self._of_task[name] = language_model
                continue
            if "." in name or hasattr(self.heads, name):
                raise ValueError(f"A task with a linear head cannot have the name '{name}'.")
            config.update({key: value for key, value in head.items() if key != "model_class"})
            model = model_class(config, self.transformer)
            # Not the model: its transformer may be spread over several devices.
            self.heads[name] = getattr(model, model.head_name).to(language_model.device)
            model.head_key = f"{HEADS_KEY}{name}"
            self._of_task[name] = model
        for name in _OF_LOADING:
            if hasattr(language_model, name):
                setattr(self, name, getattr(language_model, name))
        self.train(language_model.training)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self._of_task)

    def for_task(self, task: str) -> ChatGLMPreTrainedModel:
        """The model of one task, of the class of its head.

        Raises:
            KeyError: naming the tasks there are.
        """
        if task not in self._of_task:
            raise KeyError(f"There is no task {task!r} here; there are {', '.join(self._of_task)}.")
        return self._of_task[task]

    def train(self, mode: bool = True) -> ChatGLMForMultipleTasks:
        """As in torch, for the models of the tasks too."""
        super().train(mode)
        for model in self._of_task.values():
            model.train(mode)
        return self

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        task: str | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """As the forward pass of the task's own class, for a batch of one task.

        In training, the heads of the other tasks are added to the loss with a weight of 0, so that every process has a
        gradient for every parameter.

        Raises:
            KeyError: if there is no such task.
        """
        if labels is not None:
            kwargs["labels"] = labels
        outputs = self.for_task(task or "")(input_ids=input_ids, **kwargs)
        if self.training and outputs.loss is not None:
            for parameter in self.heads.parameters():
                outputs.loss = outputs.loss + 0 * parameter.sum()
        return outputs
