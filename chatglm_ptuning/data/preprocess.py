"""From rows to token ids: rendering, cutting to the length limits, and a report of what was cut and left out."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from chatglm_ptuning.data.chat_format import reference_text, render, split_for_training
from chatglm_ptuning.data.conversation import Conversation, Document, Message
from chatglm_ptuning.data.forms import MESSAGE_FORMS, Columns, find_form, understand
from chatglm_ptuning.data.rendered import start_ids, text_ids
from chatglm_ptuning.data.report import Lengths, PreparationReport
from chatglm_ptuning.data.sources.rows import BadRows, fail
from chatglm_ptuning.data.truncation import cut_source
from chatglm_ptuning.model.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_ROWS_AT_ONCE = 512  # handed to the processes together: few enough to stay in memory, enough to keep them busy

Example = dict[str, Any]
Row = Mapping[str, Any]


@dataclass
class Prepared:
    """One row's examples, the counters of the report that it adds to, and its lengths.

    Attributes:
        lengths: of every example, the tokens of source and target before cutting.
        fault: what is wrong with the row, if it cannot be understood.
    """

    examples: list[Example] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    fault: str | None = None


class Preprocessor:
    """Makes training and generation examples of rows, in the chat format of the tokenizer.

    For rows with prompt and response columns the limits have the meaning of the official flags: `max_source_length`
    counts all ids in front of the answer, `[gMASK] sop` included, and `max_target_length` those of the answer, the end
    token not included. For rows with a list of messages, and for plain texts, their sum limits the whole. What exceeds
    them is cut as `cut_source` says, and answers at their end; a cut answer gets no end token. Plain texts are not cut
    but split into pieces, of which only the last has an end token.

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

    def for_training(
        self, rows: Iterable[Row], bad_rows: BadRows | None = None
    ) -> tuple[list[Example], PreparationReport]:
        """Examples `{"input_ids", "labels"}`, two lists of `[seq_len]`; labels are -100 where nothing is learned.

        Raises:
            ValueError: naming file and line, for a row that cannot be understood; with the report, if no row is left.
        """
        return self._all(self.prepare_for_training, rows, bad_rows)

    def for_generation(
        self, rows: Iterable[Row], bad_rows: BadRows | None = None
    ) -> tuple[list[Example], PreparationReport]:
        """Examples `{"input_ids", "reference"}`: the prompt of a row's last answer, and the text of that answer.

        The prompt is cut to `max_source_length`, in rows with messages too, so that there is room for an answer; the
        reference is never cut.

        Raises:
            ValueError: as `for_training`; also for plain texts, which hold no question.
        """
        return self._all(self.prepare_for_generation, rows, bad_rows)

    def stream(
        self,
        prepare_row: Callable[[Row], Prepared],
        rows: Iterable[Row],
        report: PreparationReport,
        bad_rows: BadRows | None = None,
    ) -> Iterator[Prepared]:
        """What becomes of every row, in order and with few of them in memory; the report's counters grow with it.

        Args:
            prepare_row: `prepare_for_training` or `prepare_for_generation`.
            bad_rows: counts the rows that cannot be understood; without it, the first ends the work.

        Raises:
            ValueError: as `bad_rows.add` for a row that cannot be understood, and, at the end, if no row has the
                history column.
        """
        bad_rows = bad_rows or BadRows()
        history = _HistoryColumn(self.columns)
        with self._mapping(prepare_row) as map_rows:
            bar = tqdm(disable=not self.progress, desc="Tokenizing", delay=3, unit="row")
            for prepared in map_rows(history.watch(rows)):
                bar.update()
                report.rows += 1
                if prepared.fault is not None:
                    bad_rows.add(prepared.fault)
                    report.bad += 1
                    continue
                for name in prepared.counted:
                    setattr(report, name, getattr(report, name) + 1)
                report.used += bool(prepared.examples)
                report.examples += len(prepared.examples)
                yield prepared
            bar.close()
        history.check()

    def _all(
        self, prepare_row: Callable[[Row], Prepared], rows: Iterable[Row], bad_rows: BadRows | None
    ) -> tuple[list[Example], PreparationReport]:
        report, lengths = PreparationReport(), Lengths()
        examples: list[Example] = []
        for prepared in self.stream(prepare_row, rows, report, bad_rows):
            examples += prepared.examples
            lengths.source.extend(source for source, _ in prepared.lengths)
            lengths.target.extend(target for _, target in prepared.lengths)
        if not examples:
            raise ValueError(nothing_left(report))
        report.set_lengths(lengths.source, lengths.target, [len(example["input_ids"]) for example in examples])
        return examples, report

    @contextmanager
    def _mapping(
        self, prepare_row: Callable[[Row], Prepared]
    ) -> Iterator[Callable[[Iterable[Row]], Iterator[Prepared]]]:
        """A `map` that keeps the order, over processes if there are to be several; faults of a row are part of it."""
        if self.num_workers <= 1:
            yield lambda rows: (_tried(prepare_row, row) for row in rows)
            return
        with multiprocessing.Pool(self.num_workers, _set_task, (prepare_row,)) as pool:

            def in_blocks(rows: Iterable[Row]) -> Iterator[Prepared]:
                remaining = iter(rows)
                # pool.imap would read all rows before the first is done.
                while block := list(itertools.islice(remaining, _ROWS_AT_ONCE * self.num_workers)):
                    yield from pool.map(_do_task, block)

            yield in_blocks

    def _read(self, row: Row) -> tuple[str, Conversation | Document, str | None]:
        """Form, meaning (up to the last answer to be learned), and why the row is to be left out, if it is."""
        form, found = understand(row, self.columns, self.source_prefix)
        missing = found.missing_side()
        if isinstance(found, Document):
            return form, found, missing
        learned = found.until_last_learned()
        return form, learned, missing or (None if learned.messages else "without_targets")

    def prepare_for_training(self, row: Row) -> Prepared:
        """The training examples of one row.

        Raises:
            ValueError: naming file and line, if it cannot be understood.
        """
        form, found, left_out = self._read(row)
        if left_out:
            return Prepared(counted=[left_out])
        if isinstance(found, Document):
            return self._pieces(found)
        prepared = Prepared()
        for part in split_for_training(found, self.tokenizer):
            self._add_training_example(row, part, form in MESSAGE_FORMS, prepared)
        if not prepared.examples:
            prepared.counted.append("too_long")
        return prepared

    def _pieces(self, document: Document) -> Prepared:
        start = start_ids(self.tokenizer)
        ids = [*text_ids(self.tokenizer, self.source_prefix + document.text), self.tokenizer.eos_token_id]
        room = self.max_source_length + self.max_target_length - len(start)
        prepared = Prepared()
        for begin in range(0, len(ids), room):
            piece = ids[begin : begin + room]
            labels = [IGNORED_LABEL] * len(start) + piece
            prepared.examples.append({"input_ids": start + piece, "labels": labels})
            prepared.lengths.append((len(start), len(piece)))
        return prepared

    def _add_training_example(self, row: Row, conversation: Conversation, shared: bool, prepared: Prepared) -> None:
        try:
            rendered = render(conversation, self.tokenizer)
        except ValueError as error:
            fail(row, f"{error}.")
        source, target = rendered.answer_start, len(rendered.input_ids) - rendered.answer_start - 1
        source_room, target_room = self.max_source_length, self.max_target_length
        limit = source_room + target_room
        if shared:
            # Each side may use what the other leaves free.
            source_room = limit - min(target, target_room)
        counted = []
        if source > source_room:
            cut = cut_source(conversation, source_room, self.tokenizer)
            if cut is None:
                return
            counted += ["history_cut"] * cut.history_cut + ["source_cut"] * cut.text_cut
            rendered = render(cut.conversation, self.tokenizer)
        if shared:
            target_room = limit - rendered.answer_start
        ids, mask = rendered.input_ids, rendered.loss_mask
        if target > target_room:
            if target_room <= rendered.answer_header:
                return
            counted.append("target_cut")
            ids = ids[: rendered.answer_start + target_room]
        labels = [index if learned else IGNORED_LABEL for index, learned in zip(ids, mask, strict=False)]
        prepared.counted += counted
        prepared.examples.append({"input_ids": ids, "labels": labels})
        prepared.lengths.append((source, target))

    def prepare_for_generation(self, row: Row) -> Prepared:
        """The prompt and the reference of one row.

        Raises:
            ValueError: naming file and line, if it cannot be understood.
        """
        _, found, left_out = self._read(row)
        if left_out:
            return Prepared(counted=[left_out])
        if isinstance(found, Document):
            fail(row, "a plain text has no question to answer; name two columns, or score it by its loss (--do_eval).")
        plain = found.not_learned()
        try:
            whole = render(plain, self.tokenizer)
        except ValueError as error:
            fail(row, f"{error}.")
        prepared = Prepared(lengths=[(whole.answer_start, len(whole.input_ids) - whole.answer_start - 1)])
        prompt = whole.input_ids[: whole.answer_start]
        if len(prompt) > self.max_source_length:
            cut = cut_source(plain, self.max_source_length, self.tokenizer)
            if cut is None:
                return Prepared(counted=["too_long"])
            prepared.counted += ["history_cut"] * cut.history_cut + ["source_cut"] * cut.text_cut
            prompt = render(cut.conversation, self.tokenizer, for_generation=True).input_ids
        prepared.examples.append({"input_ids": prompt, "reference": reference_text(found.messages[-1], self.tokenizer)})
        return prepared


def nothing_left(report: PreparationReport) -> str:
    """The message about data of which nothing can be used."""
    return f"There is nothing to work with in the data:\n{report.summary()}"


def _tried(prepare_row: Callable[[Row], Prepared], row: Row) -> Prepared:
    try:
        return prepare_row(row)
    except ValueError as error:
        return Prepared(fault=str(error))


_task: Callable[[Row], Prepared]  # in a worker process: set once, so that the tokenizer does not travel with the rows


def _set_task(prepare_row: Callable[[Row], Prepared]) -> None:
    global _task
    _task = prepare_row


def _do_task(row: Row) -> Prepared:
    return _tried(_task, row)


class _HistoryColumn:
    """A single row may do without history; if no row has the column, its name must be wrong."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.without: Row | None = None
        self.found = columns.history is None

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if not self.found:
                if self.columns.history in row:
                    self.found = True
                elif self.without is None and _is_of_columns(row, self.columns):
                    self.without = row
            yield row

    def check(self) -> None:
        if self.found or self.without is None:
            return
        names = ", ".join(repr(column) for column in self.without)
        fail(
            self.without,
            f"no row has the column {self.columns.history!r} (this one has {names}); name the right one with "
            "--history_column, or leave that out.",
        )


def _is_of_columns(row: Row, columns: Columns) -> bool:
    try:
        return find_form(row, columns) in ("columns", "alpaca")
    except ValueError:
        return False
