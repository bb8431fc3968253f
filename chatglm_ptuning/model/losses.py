"""The mean loss over what is supervised, for the language model and the heads."""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORED_LABEL = -100
"""The label of a position that has nothing to be learned."""


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy in float32, the mean over all labels that are not -100; 0 if all of them are.

    Args:
        logits: `[..., classes]`.
        labels: `[...]`.
        num_items_in_batch: what the sum is divided by instead of the number of labels that are not -100. The Trainer
            passes the number in all batches of a step, so that gradient accumulation changes nothing.
    """
    labels = labels.to(logits.device)
    total = functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    items = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """`cross_entropy` of every position's logits `[batch, seq_len, vocab]` with the label of the next position."""
    # The labels are shifted, not the logits, which are large.
    return cross_entropy(logits, functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL), num_items_in_batch)
