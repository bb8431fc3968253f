"""How far a prefix moves a model from its own base: KL divergence and perplexity on general text."""

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
from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.modeling_chatglm import ChatGLMModel, ChatGLMPreTrainedModel
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch

_POSITIONS_AT_ONCE = 256
"""Positions whose logits are in memory together: 256 of 65,024 numbers are 64 MiB in float32, of which the two
distributions and the gradient take about five at a time."""


def kl_from_base(
    model: ChatGLMPreTrainedModel, batch: Mapping[str, torch.Tensor], prefix: PrefixArgument = None
) -> torch.Tensor:
    """The sum of KL(base || tuned) over all real positions of a batch, a float32 scalar in nats.

    The base is the same model without its prefix, and gets no gradient. Both distributions of the next token are over
    the whole vocabulary, by the output layer of the language model, also in a model with another head. The direction
    punishes the tuned model where it finds unlikely what the base would say (forgetting), rather than what it says
    anew. Neither pass has dropout on the prefix, so the value is that of the model as it will be used, and nothing
    is drawn from the random state.

    It costs a forward pass of the base and one of the tuned model, and the backward pass of the latter. Logits exist
    for 256 positions at a time and are computed again in the backward pass; kept are the hidden states of both.

    Args:
        batch: `input_ids`, `attention_mask` and `position_ids`, each `[batch, seq_len]`.
        prefix: as for a forward pass; by default the selected one.
    """
    base: ChatGLMModel = model.base_model
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = _states(base, batch, base.prefix_batch(None))[real]
    ours = _states(base, batch, base.resolve_prefix(prefix))[real]
    return sum(
        checkpoint(_chunk_divergence, base, *chunks, use_reentrant=False)
        for chunks in zip(theirs.split(_POSITIONS_AT_ONCE), ours.split(_POSITIONS_AT_ONCE), strict=True)
    )


def measure_drift(
    model: ChatGLMPreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    batch_size: int,
    *,
    prefix: PrefixArgument = None,
    under_engine: bool = False,
) -> dict[str, float]:
    """How far a prefix has moved the model from its base on some examples.

    Several processes share the batches, and all get the same numbers.

    Args:
        examples: with `input_ids` and `labels`, as for training.
        prefix: as for a forward pass; by default the selected one.
        under_engine: a DeepSpeed engine manages the model already (it has been trained).

    Returns:
        `kl`: KL(base || tuned) in nats per token, over every position. `perplexity_base` and `perplexity`: per token,
        over the tokens that have labels (texts and answers), of the base and with the prefix. `tokens`: positions.
    """
    batches = [
        [examples[place] for place in range(start, min(start + batch_size, len(examples)))]
        for start in range(0, len(examples), batch_size)
    ]
    # With a partitioned base (ZeRO-3) all processes have to call the output layer equally often.
    chunks = -(-batch_size * max(lengths_of(examples)) // _POSITIONS_AT_ONCE)
    collate = PaddingCollator(pad_token_id, "right")

    @torch.no_grad()
    def work(share: Sequence[Sequence[Mapping[str, Any]]]) -> list[torch.Tensor]:
        used = model.resolve_prefix(prefix)
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


def _states(base: ChatGLMModel, batch: Mapping[str, torch.Tensor], prefix: PrefixBatch) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return base(**inputs, use_cache=False, prefix=prefix).last_hidden_state


def _chunk_divergence(base: ChatGLMModel, theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Hidden states `[positions, hidden_size]` of base and tuned model -> the sum of KL(base || tuned)."""
    expected, found = (base.output_layer(states).float().log_softmax(-1) for states in (theirs, ours))
    return functional.kl_div(found, expected, reduction="sum", log_target=True)


def _sums(base: ChatGLMModel, batch: Mapping[str, torch.Tensor], chunks: int, prefix: PrefixBatch) -> torch.Tensor:
    """Sums of a batch, float64: divergence, positions, loss of the base and of the tuned model, labels.

    Args:
        chunks: in how many parts logits are computed.
    """
    real = batch["attention_mask"].bool()
    labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)[real]
    theirs, ours = (_states(base, batch, used)[real] for used in (base.prefix_batch(None), prefix))
    sums = torch.zeros(5, dtype=torch.float64, device=labels.device)
    for one, other, wanted in zip(*(whole.tensor_split(chunks) for whole in (theirs, ours, labels)), strict=True):
        expected, found = (base.output_layer(states).float().log_softmax(-1) for states in (one, other))
        losses = [functional.nll_loss(values, wanted, reduction="sum") for values in (expected, found)]
        divergence = functional.kl_div(found, expected, reduction="sum", log_target=True)
        numbers = (divergence, len(wanted), *losses, (wanted != IGNORED_LABEL).sum())
        sums += torch.stack([torch.as_tensor(number, device=sums.device).double() for number in numbers])
    return sums
