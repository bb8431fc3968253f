"""Preserving the base: general rows are replayed in training with a KL loss, and the drift is reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from chatglm_ptuning.data.collate import PackingCollator, PaddingCollator, pack
from chatglm_ptuning.data.dataset import Loader, Split, lengths_of, shared_rows
from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.data.tasks.heads.conversations import ConversationAnswers
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.drift import kl_from_base, measure_drift
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
from chatglm_ptuning.model.placement import batch_on_device
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.training.arguments import PreservationArguments

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

_BUNDLED = Path(__file__).resolve().parents[2] / "data" / "general_prompts"


@dataclass
class GeneralRows:
    """Tokenised general rows.

    Attributes:
        replayed: for training; None where nothing is.
        held_out: to measure on; None where nothing is measured.
    """

    replayed: datasets.Dataset | None
    held_out: datasets.Dataset | None


def read_general_rows(
    arguments: PreservationArguments,
    tokenizer: ChatGLMTokenizer,
    loader: Loader,
    *,
    replays: bool,
    measures: bool,
    ignored_columns: Sequence[str] = (),
) -> GeneralRows:
    """Reads the rows to replay and the rows to measure the drift on.

    Args:
        replays: rows to replay are needed.
        measures: rows to measure on are needed.
        ignored_columns: columns that are left out, although they hold text.

    Raises:
        ValueError: naming file and line, for rows that cannot be understood; if a row is in both files.
    """
    half = arguments.preserve_max_length // 2
    lengths = arguments.preserve_max_length - half, half

    def read(names: Sequence[str] | None, bundled: str, limit: int | None = None) -> datasets.Dataset:
        wanted = names or [str(_BUNDLED / bundled)]
        head = ConversationAnswers(Task.of_files(wanted, Columns(ignored=tuple(ignored_columns))), tokenizer, *lengths)
        return loader.rows(head, Split(wanted, limit=limit)).rows

    replayed = read(arguments.preserve_file, "train.json") if replays else None
    held_out = None
    if measures and not (arguments.preserve_eval_file or _BUNDLED.is_dir()):
        logger.warning("The drift from the base is not measured: set preserve_eval_file.")
    elif measures:
        held_out = read(arguments.preserve_eval_file, "held_out.json", arguments.max_preserve_eval_samples)
    if replayed is not None and held_out is not None and (count := shared_rows(replayed, held_out)):
        raise ValueError(
            f"{count} rows of preserve_eval_file are in preserve_file too: replayed rows cannot measure the drift on "
            "other texts. Remove them from one of the files."
        )
    return GeneralRows(replayed, held_out)


class Replay:
    """The loss term of `preserve_base`: weight x mean KL(base || tuned) per token of general rows.

    The rows of a step depend on the seed, the step and how many rows a step has on all processes, accumulation
    included. So a resumed run replays the same rows, and so do other numbers of processes with the same product, as
    each takes its share; the mean is over all tokens of the step. Only a step that the end of an epoch cuts short
    replays fewer, as many as it has batches, and that number depends on the processes.

    Args:
        rows: examples with `input_ids`.
        weight: of the divergence against the loss of the task.
        batch_size: rows of one batch on one device; None for as many as a batch of the task has.
        seed: of the run.
        max_tokens: of a forward pass on packed rows; None to pad the rows of every batch.
        mask_target: as for `kl_from_base`.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        weight: float,
        pad_token_id: int,
        *,
        batch_size: int | None = None,
        seed: int = 42,
        max_tokens: int | None = None,
        mask_target: bool = False,
    ) -> None:
        self.rows = rows
        self.weight = weight
        self.batch_size = batch_size
        self.seed = seed
        self.max_tokens = max_tokens
        self.mask_target = mask_target
        self._lengths = lengths_of(rows)
        self._pad = PaddingCollator(pad_token_id, "right")
        self._order = lru_cache(maxsize=4)(self._order_of_epoch)

    def rows_of_step(self, step: int, count: int, step_rows: int | None = None) -> list[int]:
        """The rows that a step replays.

        Every row comes once before any comes again.

        Args:
            step: from 0.
            count: how many, on all processes.
            step_rows: rows of a full step, if the end of an epoch cuts this one short.
        """
        start = step * (step_rows or count)
        places = (divmod(place, len(self.rows)) for place in range(start, start + count))
        return [self._order(epoch)[place] for epoch, place in places]

    def divergences(
        self,
        model: ChatGLMPreTrainedModel,
        step: int,
        batch_size: int,
        *,
        own: Sequence[int] = (0,),
        parts: int = 1,
        whole_parts: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Summands of a step's mean KL per token, one for each forward pass. The sum over all parts is the mean.

        Args:
            model: the model itself, without what DDP or DeepSpeed put around it.
            batch_size: rows of a batch of the task.
            own: which of the step's batches, on all processes, to compute.
            parts: how many batches the step has.
            whole_parts: number of parts of a full step, which the end of an epoch has not shortened.
        """
        size = self.batch_size or batch_size
        chosen = self.rows_of_step(step, size * parts, size * (whole_parts or parts))
        tokens = sum(self._lengths[place] for place in chosen)
        rows = [
            [{"input_ids": self.rows[place]["input_ids"]} for place in chosen[part * size :][:size]] for part in own
        ]
        if self.max_tokens is None:
            batches = [self._pad(batch) for batch in rows]
        else:
            batches = pack(PackingCollator()(list(chain.from_iterable(rows)))["rows"], self.max_tokens)
        for batch in batches:
            yield kl_from_base(model, batch_on_device(batch, model.device), self.mask_target) / tokens

    def _order_of_epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.rows), generator=generator).tolist()


def drift_report(
    model: ChatGLMPreTrainedModel,
    held_out: datasets.Dataset,
    tokenizer: ChatGLMTokenizer,
    batch_size: int,
    *,
    under_engine: bool,
) -> dict[str, float]:
    """The metrics of `measure_drift`, named `general_...`."""
    found = measure_drift(model, held_out, tokenizer.pad_token_id, batch_size, under_engine=under_engine)
    return {f"general_{name}": value for name, value in found.items()}
