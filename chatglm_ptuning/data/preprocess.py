"""From rows to token ids: rendering, cutting to the length limits, and a report of what was cut and left out."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from chatglm_ptuning.data.chat_format import render, split_for_training
from chatglm_ptuning.data.conversation import (
    Columns,
    Conversation,
    Message,
    fail,
    holds_conversation,
    to_conversation,
)
from chatglm_ptuning.data.truncation import cut_source
from chatglm_ptuning.model.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_PERCENTILES = (50, 90, 99, 100)


@dataclass
class PreparationReport:
    """What became of the rows.

    Attributes:
        rows: all rows; each is either used or counted in one of the four fields that follow `examples`.
        used: rows with at least one example.
        examples: more than `used` if conversations were split, one example for each answer to be learned.
        empty: rows left out for having neither prompt nor response.
        one_sided: rows left out for having only one of them.
        without_targets: rows left out because nothing in them is to be learned.
        too_long: rows left out because even without their questions they exceed the limit.
        history_cut, source_cut, target_cut: examples whose oldest turns, middle of the source, or end of the answer
            had to go. A cut answer has no end token.
        lengths: percentiles (`50`, `90`, `99`, `100`) of the tokens of `source` and `target` before any cutting, and
            of the `example` after it.
    """

    rows: int = 0
    used: int = 0
    examples: int = 0
    empty: int = 0
    one_sided: int = 0
    without_targets: int = 0
    too_long: int = 0
    history_cut: int = 0
    source_cut: int = 0
    target_cut: int = 0
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """The report in a few lines for people; without the lines that have nothing to say."""
        lines = [f"{self.rows} rows, {self.used} used, {self.examples} examples"]
        left_out = {
            "empty": self.empty,
            "with only a question or only an answer": self.one_sided,
            "with nothing to learn": self.without_targets,
            "too long to be cut to the limit": self.too_long,
        }
        cut = {
            "without their oldest turns": self.history_cut,
            "without the middle of the source (--max_source_length)": self.source_cut,
            "without the end of the answer (--max_target_length)": self.target_cut,
        }
        for name, counts in (("rows left out", left_out), ("examples cut", cut)):
            if any(counts.values()):
                lines.append(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items() if count))
        for name, values in self.lengths.items():
            when = "after cutting" if name == "example" else "before cutting"
            lines.append(
                f"tokens of the {name} {when}: half have at most {values['50']}, 90 % {values['90']}, "
                f"99 % {values['99']}, the longest has {values['100']}"
            )
        return "\n".join(lines)


@dataclass
class _Prepared:
    """One row's examples, the counters of the report that it adds to, and its lengths."""

    examples: list[dict[str, Any]] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)


class Preprocessor:
    """Makes training and generation examples of rows, in the chat format of the tokenizer.

    For rows with prompt and response columns the limits have the meaning of the official flags: `max_source_length`
    counts all ids in front of the answer, `[gMASK] sop` included, and `max_target_length` those of the answer, the end
    token not included. For `conversations` rows their sum limits the whole. What exceeds them is cut as `cut_source`
    says, and answers at their end; a cut answer gets no end token.

    Args:
        num_workers: processes to work with (the official `--preprocessing_num_workers`).
        progress: show a progress bar if it takes longer than a few seconds.

    Raises:
        ValueError: if a limit is not positive, or `max_source_length` is too small for the chat format itself.
    """

    def __init__(
        self,
        tokenizer: ChatGLMTokenizer,
        columns: Columns,
        max_source_length: int,
        max_target_length: int,
        source_prefix: str = "",
        *,
        num_workers: int = 1,
        progress: bool = True,
    ) -> None:
        for name, value in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.tokenizer = tokenizer
        self.columns = columns
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.source_prefix = source_prefix
        self.num_workers = num_workers
        self.progress = progress
        shortest = render(Conversation([Message("user", "？")], source_prefix), tokenizer, for_generation=True)
        if len(shortest.input_ids) > max_source_length:
            raise ValueError(
                f"max_source_length={max_source_length} is too small: in the {tokenizer.chat_format} format a question "
                f"of one character takes {len(shortest.input_ids)} tokens"
                f"{' with the source prefix' if source_prefix else ''}; set --max_source_length higher."
            )

    def for_training(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], PreparationReport]:
        """Examples `{"input_ids", "labels"}`, two lists of `[seq_len]`; labels are -100 where nothing is learned.

        Raises:
            ValueError: naming file and line, for a row that cannot be understood; with the report, if no row is left.
        """
        return self._prepare(self._training_row, rows)

    def for_generation(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], PreparationReport]:
        """Examples `{"input_ids", "reference"}`: the prompt of a row's last answer, and the text of that answer.

        The prompt is cut to `max_source_length`, in `conversations` rows too, so that there is room for an answer; the
        reference is never cut.

        Raises:
            ValueError: as `for_training`.
        """
        return self._prepare(self._generation_row, rows)

    def _prepare(
        self, prepare_row: Callable[[Mapping[str, Any]], _Prepared], rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], PreparationReport]:
        self._check_history_column(rows)
        examples: list[dict[str, Any]] = []
        counts: Counter[str] = Counter(rows=len(rows))
        lengths: list[tuple[int, int]] = []
        with self._mapping(len(rows)) as map_rows:
            bar = tqdm(
                map_rows(prepare_row, rows), "Tokenizing", len(rows), disable=not self.progress, delay=3, unit="row"
            )
            for prepared in bar:
                examples += prepared.examples
                counts.update(prepared.counted)
                counts["used"] += bool(prepared.examples)
                lengths += prepared.lengths
        counts["examples"] = len(examples)
        report = PreparationReport(**counts)
        if not examples:
            raise ValueError(f"There is nothing to work with in the data:\n{report.summary()}")
        report.lengths = {
            "source": _percentiles([source for source, _ in lengths]),
            "target": _percentiles([target for _, target in lengths]),
            "example": _percentiles([len(example["input_ids"]) for example in examples]),
        }
        return examples, report

    @contextmanager
    def _mapping(self, rows: int) -> Iterator[Callable[..., Iterator[_Prepared]]]:
        """A `map` that keeps the order, over processes if there are to be several."""
        workers = min(self.num_workers, rows)
        if workers <= 1:
            yield map
            return
        with multiprocessing.Pool(workers) as pool:
            # The tokenizer travels with every chunk, hence few of them.
            yield partial(pool.imap, chunksize=-(-rows // (4 * workers)))

    def _check_history_column(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A single row may do without history; if no row has the column, its name must be wrong."""
        name = self.columns.history
        plain = [row for row in rows if not holds_conversation(row, self.columns)]
        if name and plain and not any(name in row for row in plain):
            names = ", ".join(repr(column) for column in plain[0])
            fail(
                plain[0],
                f"no row has the column {name!r} (this one has {names}); name the right one with --history_column, "
                "or leave that out.",
            )

    def _read(self, row: Mapping[str, Any]) -> tuple[Conversation, str | None]:
        """The conversation up to its last answer to be learned, and why the row is to be left out, if it is."""
        conversation = to_conversation(row, self.columns, self.source_prefix)
        missing = conversation.missing_side()
        learned = conversation.until_last_learned()
        return learned, missing or (None if learned.messages else "without_targets")

    def _training_row(self, row: Mapping[str, Any]) -> _Prepared:
        conversation, left_out = self._read(row)
        if left_out:
            return _Prepared(counted=[left_out])
        prepared = _Prepared()
        for part in split_for_training(conversation, self.tokenizer):
            self._add_training_example(row, part, prepared)
        if not prepared.examples:
            prepared.counted.append("too_long")
        return prepared

    def _add_training_example(self, row: Mapping[str, Any], conversation: Conversation, prepared: _Prepared) -> None:
        try:
            rendered = render(conversation, self.tokenizer)
        except ValueError as error:
            fail(row, f"{error}.")
        source, target = rendered.answer_start, len(rendered.input_ids) - rendered.answer_start - 1
        source_room, target_room = self.max_source_length, self.max_target_length
        limit = source_room + target_room
        shared = holds_conversation(row, self.columns)
        if shared:
            # Each side may use what the other leaves free.
            source_room = limit - min(target, target_room)
        if source > source_room:
            cut = cut_source(conversation, source_room, self.tokenizer)
            if cut is None:
                return
            prepared.counted += ["history_cut"] * cut.history_cut + ["source_cut"] * cut.text_cut
            rendered = render(cut.conversation, self.tokenizer)
        if shared:
            target_room = limit - rendered.answer_start
        ids, mask = rendered.input_ids, rendered.loss_mask
        if target > target_room:
            prepared.counted.append("target_cut")
            ids = ids[: rendered.answer_start + target_room]
        labels = [index if learned else IGNORED_LABEL for index, learned in zip(ids, mask, strict=False)]
        prepared.examples.append({"input_ids": ids, "labels": labels})
        prepared.lengths.append((source, target))

    def _generation_row(self, row: Mapping[str, Any]) -> _Prepared:
        conversation, left_out = self._read(row)
        if left_out:
            return _Prepared(counted=[left_out])
        answer = conversation.messages[-1]
        plain = Conversation(
            [Message(old.role, old.content, old.metadata) for old in conversation.messages], conversation.source_prefix
        )
        try:
            whole = render(plain, self.tokenizer)
        except ValueError as error:
            fail(row, f"{error}.")
        prepared = _Prepared(lengths=[(whole.answer_start, len(whole.input_ids) - whole.answer_start - 1)])
        prompt = whole.input_ids[: whole.answer_start]
        if len(prompt) > self.max_source_length:
            cut = cut_source(plain, self.max_source_length, self.tokenizer)
            if cut is None:
                return _Prepared(counted=["too_long"])
            prepared.counted += ["history_cut"] * cut.history_cut + ["source_cut"] * cut.text_cut
            prompt = render(cut.conversation, self.tokenizer, for_generation=True).input_ids
        reference = f"{answer.metadata}\n{answer.content}" if answer.metadata else answer.content
        prepared.examples.append({"input_ids": prompt, "reference": reference})
        return prepared


def _percentiles(values: list[int]) -> dict[str, int]:
    """The smallest value that at least so many per cent do not exceed."""
    ordered = sorted(values)
    return {str(share): ordered[max(0, -(-len(ordered) * share // 100) - 1)] for share in _PERCENTILES}
