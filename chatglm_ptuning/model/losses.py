"""The mean loss over all supervised positions, for the language model and the heads."""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORED_LABEL = -100
"""The label of a masked position, which the loss ignores."""


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
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """`cross_entropy` of the logits `[batch, seq_len, vocab]` of every position with the label of the next one."""
    # The labels are shifted, not the logits, which are large.
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return cross_entropy(logits, shifted, num_items_in_batch, smoothing)
