"""The mean loss over all supervised positions, for the language model and the heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from chatglm_ptuning.model.frozen_linear import apply_linear, is_frozen_linear, linear, rounded_up
from chatglm_ptuning.model.packed_sequences import last_tokens

IGNORED_LABEL = -100
"""The label of a masked position, which the loss ignores."""
_STATES_AT_ONCE = 512
"""Most positions whose logits exist at the same time; products of fewer are slower, on a CPU too."""


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy in float32, the mean over all labels that are not -100; 0 if all of them are.

    Args:
        logits: `[..., classes]`.
        labels: `[...]`.
        num_items_in_batch: divides the sum, instead of the number of labels that are not -100. The Trainer passes the
            number in all batches of a step, so that gradient accumulation does not change the loss.
        smoothing: of the labels: share of the target that is spread evenly over all classes, 0 to 1 (Szegedy et al.
            2016). Its name must not begin with "label": transformers takes such arguments of a model for labels.
    """
    labels = labels.to(logits.device)
    total = functional.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        label_smoothing=smoothing,
    )
    items = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return mean_loss(total, items)


def mean_loss(total: torch.Tensor, items: torch.Tensor | int) -> torch.Tensor:
    """The mean of a sum over so many items; 0 items count as 1. A number does not make a GPU wait, as a tensor does."""
    return total / (items.to(total.device).clamp(min=1) if torch.is_tensor(items) else max(items, 1))


def next_labels(labels: torch.Tensor, sequence_lengths: Sequence[int] | None = None) -> torch.Tensor:
    """The label of the next token for every position, `[batch, seq_len]`; -100 at the last of a row.

    Args:
        sequence_lengths: of the sequences of a packed row; then -100 at the last token of each.
    """
    # The labels are shifted, not the logits, which are large.
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    if sequence_lengths is None:
        return shifted
    return shifted.index_fill(1, last_tokens(sequence_lengths, labels.device), IGNORED_LABEL)


def loss_of_states(
    states: torch.Tensor,
    output_layer: nn.Module,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """`cross_entropy` of the output layer's logits, without keeping them if the layer is a frozen linear one.

    Args:
        states: `[positions, hidden_size]`.
        labels: `[positions]`, none of them -100.
    """
    labels = labels.to(states.device)
    items = len(labels) if num_items_in_batch is None else num_items_in_batch
    if not is_frozen_linear(output_layer) or output_layer.bias is not None:
        return cross_entropy(apply_linear(output_layer, states), labels, items, smoothing)
    total = _FrozenLinearCrossEntropy.apply(states, output_layer.weight, labels, smoothing)
    return mean_loss(total, items)


def divergence_of_states(
    states: torch.Tensor,
    output_layer: nn.Module,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The mean KL(teacher || model) in nats per position, a float32 scalar.

    The teacher's likeliest tokens are classes, and all other tokens are one class together.

    Args:
        states: `[positions, hidden_size]`.
        teacher_ids: the teacher's likeliest tokens at each position, int64 `[positions * k]`.
        teacher_logprobs: their log-probabilities, and as the last of each position that of all other tokens, float32
            `[positions * (k + 1)]`.
        num_items_in_batch: divides the sum, instead of the number of positions.
    """
    positions = len(states)
    items = positions if num_items_in_batch is None else num_items_in_batch
    if not positions:
        return mean_loss(states.float().sum(), items)
    parts = max(1, -(-positions // _STATES_AT_ONCE))
    expected = teacher_logprobs.to(states.device, torch.float32).view(positions, -1)
    ids = teacher_ids.to(states.device).view(positions, -1)

    def divergence(own: torch.Tensor, ids: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        found = logprobs_of_classes(apply_linear(output_layer, own), ids)
        return functional.kl_div(found, expected, reduction="sum", log_target=True)

    chunks = zip(*(whole.tensor_split(parts) for whole in (states, ids, expected)), strict=True)
    total = sum(checkpoint(divergence, *chunk, use_reentrant=False) for chunk in chunks)
    return mean_loss(total, items)


def logprobs_of_classes(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, and of all others together, float32 `[positions, k + 1]`.

    Args:
        logits: `[positions, vocabulary]`.
        ids: int64 `[positions, k]`, fewer than the vocabulary.
    """
    logits = logits.float()
    whole = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat((logits.gather(-1, ids), others), dim=-1) - whole


class _FrozenLinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross entropies of `states @ weight.T`, a few positions at a time.

    The gradient of the states is computed with the loss, so that nothing of the logits is kept. As where the logits
    exist as a whole, they have the dtype of the states, and the rest is float32. `linear_cross_entropy` of torch 2.13
    rounds the loss to the dtype of the states, and computes with float32 copies of 16-bit weights on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, smoothing: float
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        parts = max(1, -(-len(states) // _STATES_AT_ONCE))
        grads = []
        for own, wanted in zip(states.tensor_split(parts), labels[:, None].tensor_split(parts), strict=True):
            rows, filling = len(own), rounded_up(len(own)) - len(own)
            logits = linear(functional.pad(own, (0, 0, 0, filling)), weight)
            scores = logits if logits.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
            error = torch.log_softmax(logits, -1, dtype=torch.float32, out=scores)
            total -= (1 - smoothing) * error[:rows].gather(-1, wanted).sum()
            if smoothing:
                total -= smoothing * error[:rows].mean(-1).sum()
            error.exp_()[:rows].scatter_add_(-1, wanted, error.new_full(wanted.shape, smoothing - 1))
            if smoothing:
                error -= smoothing / len(weight)
            if scores is not logits:
                error = logits.copy_(error)
            grads.append(linear(error, weight.T)[:rows])
        grad = torch.cat(grads)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_of_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_of_total.to(grad.dtype), None, None, None
