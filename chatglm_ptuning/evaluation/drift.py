"""The distance of a tuned model from its own base: KL divergence and perplexity on general text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.dataset import lengths_of
from chatglm_ptuning.evaluation.batches import evaluating
from chatglm_ptuning.evaluation.parallel import do_together
from chatglm_ptuning.model.frozen_linear import apply_linear
from chatglm_ptuning.model.losses import IGNORED_LABEL, next_labels
from chatglm_ptuning.model.modeling_chatglm import ChatGLMModel, ChatGLMPreTrainedModel
from chatglm_ptuning.prefix.batch import PrefixBatch

_POSITIONS_AT_ONCE = 256
"""Positions whose logits are in memory at once: 256 x 65,024 float32 numbers are 64 MiB, and the two distributions with
their gradient take about five times that."""


def kl_from_base(model: ChatGLMPreTrainedModel, batch: Mapping[str, Any], mask_target: bool = False) -> torch.Tensor:
    """The sum of KL(base || tuned) over all real positions of a batch, a float32 scalar in nats.

    The base is the same model without its prefix, and gets no gradient. Both distributions of the next token are over
    the whole vocabulary, by the output layer of the language model, also in a model with another head. The direction
    penalises tokens that are likely for the base and unlikely for the tuned model (forgetting), rather than new ones.
    Neither pass has prefix dropout, so the value is that of the model in use and the random state does not change.

    It costs a forward pass of the base and one of the tuned model, and the backward pass of the latter. Logits exist
    for 256 positions at a time and are recomputed in the backward pass; the hidden states of both are kept.

    Args:
        model: with the prefix selected.
        batch: `input_ids`, `attention_mask` and `position_ids`, each `[batch, seq_len]`; or packed sequences,
            `input_ids` `[1, tokens]` and `sequence_lengths`.
        mask_target: leave the row's next token out of both distributions and renormalise the rest ("Mask the Target",
            Xu et al. 2026, arXiv 2605.29498): the tuned model may make that token more or less likely.
    """
    base: ChatGLMModel = model.base_model
    with torch.no_grad():
        theirs = _states(base, batch, base.prefix_batch(None))
    ours = _states(base, batch, base.resolve_prefix(None))
    parts = [theirs, ours, _next_ids(batch)] if mask_target else [theirs, ours]
    return sum(
        checkpoint(lambda *chunks: _divergence(base, *chunks)[0], *chunks, use_reentrant=False)
        for chunks in zip(*(part.split(_POSITIONS_AT_ONCE) for part in parts), strict=True)
    )


def measure_drift(
    model: ChatGLMPreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    batch_size: int,
    *,
    under_engine: bool = False,
) -> dict[str, float]:
    """The distance of the tuned model from its base on some examples.

    Several processes share the batches, and all get the same numbers.

    Args:
        model: with the prefix selected.
        examples: with `input_ids` and `labels`, as for training.
        under_engine: whether a DeepSpeed engine manages the model (after training).

    Returns:
        `kl`: KL(base || tuned) in nats per token, over every position. `perplexity_base` and `perplexity`: per token,
        over the tokens that have labels (texts and answers), of the base and with the prefix. `tokens`: positions.
    """
    batches = [
        [examples[place] for place in range(start, min(start + batch_size, len(examples)))]
        for start in range(0, len(examples), batch_size)
    ]
    # With a partitioned base (ZeRO-3) all processes must call the output layer equally often.
    chunks = -(-batch_size * max(lengths_of(examples)) // _POSITIONS_AT_ONCE)
    collate = PaddingCollator(pad_token_id, "right")

    @torch.no_grad()
    def work(share: Sequence[Sequence[Mapping[str, Any]]]) -> list[torch.Tensor]:
        used = model.resolve_prefix(None)
        on_device = ({name: value.to(model.device) for name, value in collate(rows).items()} for rows in share)
        return [_sums(model.base_model, batch, chunks, used).cpu() for batch in on_device]

    with evaluating(model):
        sums = sum(do_together(batches, work, model, under_engine))
    divergence, positions, base_loss, tuned_loss, labels = sums.tolist()
    return {
        "kl": divergence / positions,
        "perplexity_base": math.exp(base_loss / labels),
        "perplexity": math.exp(tuned_loss / labels),
        "tokens": int(positions),
    }


def _states(base: ChatGLMModel, batch: Mapping[str, Any], prefix: PrefixBatch) -> torch.Tensor:
    if "sequence_lengths" in batch:
        inputs = {name: batch[name] for name in ("input_ids", "sequence_lengths")}
        return base(**inputs, use_cache=False, prefix=prefix).last_hidden_state[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return base(**inputs, use_cache=False, prefix=prefix).last_hidden_state[batch["attention_mask"].bool()]


def _next_ids(batch: Mapping[str, Any]) -> torch.Tensor:
    """The next token at every real position, int64 `[positions]`; -100 at the last of a row."""
    following = next_labels(batch["input_ids"], batch.get("sequence_lengths"))
    if "sequence_lengths" in batch:
        return following[0]
    real = batch["attention_mask"].bool()
    return following.masked_fill(~next_labels(real.long()).eq(1), IGNORED_LABEL)[real]


def _divergence(
    base: ChatGLMModel, theirs: torch.Tensor, ours: torch.Tensor, masked: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of KL(base || tuned) and both log-probabilities, from hidden states `[positions, hidden_size]`.

    Args:
        masked: a token of each position that is left out of both distributions; -100 for none.
    """
    logits = [apply_linear(base.output_layer, states).float() for states in (theirs, ours)]
    if masked is not None:
        left_out = torch.zeros_like(logits[0], dtype=torch.bool)
        left_out.scatter_(-1, masked.clamp(min=0)[:, None], (masked != IGNORED_LABEL)[:, None])
        # Not minus infinity, of which a difference is NaN.
        logits = [one.masked_fill(left_out, torch.finfo(one.dtype).min / 2) for one in logits]
    expected, found = (one.log_softmax(-1) for one in logits)
    return functional.kl_div(found, expected, reduction="sum", log_target=True), expected, found


def _sums(base: ChatGLMModel, batch: Mapping[str, torch.Tensor], chunks: int, prefix: PrefixBatch) -> torch.Tensor:
    """Sums of a batch, float64: divergence, positions, loss of the base and of the tuned model, labels.

    Args:
        chunks: number of parts in which logits are computed.
    """
    labels = next_labels(batch["labels"])[batch["attention_mask"].bool()]
    theirs, ours = (_states(base, batch, used) for used in (base.prefix_batch(None), prefix))
    sums = torch.zeros(5, dtype=torch.float64, device=labels.device)
    for one, other, wanted in zip(*(whole.tensor_split(chunks) for whole in (theirs, ours, labels)), strict=True):
        divergence, *both = _divergence(base, one, other)
        losses = [functional.nll_loss(values, wanted, reduction="sum") for values in both]
        numbers = (divergence, len(wanted), *losses, (wanted != IGNORED_LABEL).sum())
        sums += torch.stack([torch.as_tensor(number, device=sums.device).double() for number in numbers])
    return sums
