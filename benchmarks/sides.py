"""The sides of a comparison that train this kit's model: the kit itself, and recipes that it is compared with."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.shapes import PADDED_LENGTH, Row
from chatglm_ptuning.data.collate import IGNORED_LABEL, PackingCollator, PaddingCollator, pack
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.training.arguments import PrefixTrainingArguments
from chatglm_ptuning.training.trainer import PrefixTrainer, tokens_per_pass

_LARGEST_NORM = 1.0
_LEARNING_RATE = 1e-3


class Side(ABC):
    """One way to train, which goes through the same rows as the others.

    Args:
        model: whose trained parameters require gradients.
        steps: the rows of every optimizer step; after the last one they begin again.
        at_once: rows of a forward pass; the gradients of the passes of a step are added up.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, steps: Sequence[Sequence[Row]], at_once: int | None = None) -> None:
        self.model = model
        self.at_once = at_once or max(map(len, steps))
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=_LEARNING_RATE, fused=True)
        self._steps = itertools.cycle(steps)

    def step(self) -> torch.Tensor:
        """One optimizer step, from rows to changed parameters; the loss, a mean over the supervised tokens."""
        loss = self.backward()
        nn.utils.clip_grad_norm_(self.trained, _LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def backward(self) -> torch.Tensor:
        """The forward and backward passes of the next step."""
        rows = next(self._steps)
        supervised = sum(label != IGNORED_LABEL for row in rows for label in row["labels"][1:])
        total = torch.zeros((), device=self.device)
        for start in range(0, len(rows), self.at_once):
            loss = self.loss(self.collate(rows[start : start + self.at_once]), supervised)
            loss.backward()
            total += loss.detach()
        return total

    @property
    def device(self) -> torch.device:
        """Of model and batches."""
        return next(self.model.parameters()).device

    @abstractmethod
    def loss(self, batch: dict[str, Any], supervised: int) -> torch.Tensor:
        """The sum of the losses of a batch over the supervised tokens of the whole step."""

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The batch of some rows, padded on the right to the longest."""
        batch = PaddingCollator(pad_token_id=0, padding_side="right")(rows)
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


class Kit(Side):
    """This kit as `train` runs it: data loader, packing and passes of `PrefixTrainer`.

    Clipping and optimizer step are those of all sides, which do without the Trainer's bookkeeping.

    Args:
        folder: for the Trainer, which writes nothing into it.
    """

    name = "this kit"

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        steps: Sequence[Sequence[Row]],
        at_once: int | None = None,
        *,
        folder: Path,
    ) -> None:
        super().__init__(model, steps, at_once)
        rows = [row for step in steps for row in step]
        self.batches = len(steps[0]) // self.at_once
        args = PrefixTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=self.at_once,
            gradient_accumulation_steps=self.batches,
            train_sampling_strategy="sequential",
            use_cpu=self.device.type == "cpu",
        )
        self.trainer = PrefixTrainer(
            model,
            args,
            train_dataset=rows,
            data_collator=PackingCollator(),
            max_tokens_per_pass=tokens_per_pass(args, rows),
        )
        self._loaded = self._forever()

    def _forever(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def backward(self) -> torch.Tensor:
        """As `Side.backward`, by the Trainer."""
        batches, items = self.trainer.get_batch_samples(self._loaded, self.batches, self.device)
        self.trainer.current_gradient_accumulation_steps = len(batches)
        losses = [self.trainer.training_step(self.model, batch, items) for batch in batches]
        return torch.stack(losses).sum()

    def loss(self, batch: dict[str, Any], supervised: int) -> torch.Tensor:
        """Not used: the Trainer computes it."""
        raise NotImplementedError


class Padded(Side):
    """This kit as it trained before it packed: dynamic padding, logits at every position."""

    name = "dynamic padding"

    def loss(self, batch: dict[str, Any], supervised: int) -> torch.Tensor:
        """As `Side.loss`."""
        return self.model(**batch, use_cache=False, num_items_in_batch=supervised).loss


class Official(Padded):
    """The official ChatGLM2-6B recipe on this kit's model.

    Every row is padded to the longest possible one, without an attention mask; the logits are computed everywhere, the
    loss in float32, and each layer again in the backward pass.
    """

    name = "official recipe"
    padded_length = PADDED_LENGTH

    def step(self) -> torch.Tensor:
        """As `Side.step`, with gradient checkpointing."""
        with checkpointing(self.model):
            return super().step()

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The rows, padded to `padded_length`."""
        size = (len(rows), self.padded_length)
        batch = {"input_ids": torch.zeros(size, dtype=torch.int64), "labels": torch.full(size, IGNORED_LABEL)}
        for place, row in enumerate(rows):
            for name, padded in batch.items():
                padded[place, : len(row[name])] = torch.tensor(row[name])
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


class BarePass(Side):
    """The floor: what any method that trains something in front of the first layer has to compute.

    A forward pass and the gradient of the embeddings, of the useful tokens alone in one packed batch, without a prefix,
    with logits where a token is supervised, and without an optimizer step.
    """

    name = "bare pass"

    def step(self) -> torch.Tensor:
        """The passes alone."""
        return self.backward()

    def loss(self, batch: dict[str, Any], supervised: int) -> torch.Tensor:
        """As `Side.loss`."""
        embeddings = self.model.transformer.embedding(batch.pop("input_ids")).detach().requires_grad_()
        none = self.model.prefix_batch(None)
        inputs = {"inputs_embeds": embeddings, "num_items_in_batch": supervised, "skip_logits": True, "prefix": none}
        return self.model(**batch, **inputs).loss

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One packed batch."""
        tokens = sum(len(row["input_ids"]) for row in rows)
        (batch,) = pack(PackingCollator()(rows)["rows"], tokens)
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


@contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """Gradient checkpointing as the official trainer and LLaMA-Factory turn it on: reentrant, inputs with gradients."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    try:
        yield
    finally:
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
