"""The rows of a distillation: conversations about a document, with the teacher's distributions, kept on disk."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.data.cache import (
    TokenCache,
    code_fingerprint,
    open_rows,
    read_facts,
    tokenizer_fingerprint,
    write_rows,
)
from chatglm_ptuning.evaluation.batches import evaluating
from chatglm_ptuning.evaluation.generate import generate_answers
from chatglm_ptuning.model.frozen_linear import apply_linear
from chatglm_ptuning.model.losses import IGNORED_LABEL, logprobs_of_classes
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.batch import PrefixBatch
from chatglm_ptuning.training.distillation.documents import Window
from chatglm_ptuning.training.distillation.self_study import questions_to_write, seeds, templated
from chatglm_ptuning.version import kit_version

if TYPE_CHECKING:
    import datasets

_COLUMNS = {"input_ids", "labels", "teacher_ids", "teacher_logprobs", "length"}
_QUESTION_TOKENS = 48
_WINDOW = "window of the document"


@dataclass(frozen=True)
class StudySettings:
    """What the rows depend on, beside document and base.

    Attributes:
        rounds: how often self-study goes through the document; each round draws other questions.
        own_questions: in each round, questions about each passage that the base writes and answers itself.
        max_row_length: most tokens of a question with its answer.
        top_k: tokens whose log-probabilities are kept at each position.
        seed: of the draws.
    """

    rounds: int
    own_questions: int
    max_row_length: int
    top_k: int
    seed: int


class Teacher:
    """The base with a window of a document in its context. It makes the rows from which a prefix learns.

    The window is a prefix of the base's own keys and values, so the base reads it once. Every round of every window is
    an entry of the cache: a run that is killed makes only the missing ones again.

    Args:
        model: the base. Its trainable prefix is not used.
        batch_size: prompts that the base answers at a time.
    """

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        settings: StudySettings,
        cache: TokenCache,
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._cache, self._batch_size = cache, batch_size

    def rows(self, windows: Sequence[Window], progress: bool = True) -> datasets.Dataset:
        """The rows of all rounds of all windows.

        Columns: `input_ids`, `labels` (-100 but at answers), and for each supervised token, flat, `teacher_ids` `[k]`
        and `teacher_logprobs` `[k + 1]` as `divergence_of_states` takes them; `length` of the `input_ids`.

        Raises:
            ValueError: if `max_row_length` is too short for every question, or the cache holds something else.
            OSError: if the cache cannot be written.
        """
        import datasets

        parts = []
        places = [(window, number) for window in windows for number in range(self.settings.rounds)]
        for window, number in tqdm(places, desc="self-study", disable=not progress):
            key = self._key(window, number)
            entry, _ = self._cache.entry(key, lambda folder, w=window, n=number: self._write(folder, w, n))
            if read_facts(entry)["rows"]:
                parts.append(_checked(entry))
        if not parts:
            raise ValueError(
                f"No question about the documents fits into --max_row_length {self.settings.max_row_length}: raise it."
            )
        return datasets.concatenate_datasets(parts)

    def _key(self, window: Window, number: int) -> dict[str, Any]:
        weight = self.model.transformer.embedding.word_embeddings.weight
        return {
            "window": asdict(window),
            "round": number,
            "settings": {**asdict(self.settings), "rounds": None},
            "base": self.model.base_fingerprint(),
            "dtype": str(weight.dtype),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "kit": [kit_version(), code_fingerprint("training/distillation")],
        }

    def _write(self, folder: Path, window: Window, number: int) -> dict[str, Any]:
        with evaluating(self.model), torch.no_grad():
            context = self.model.prefix_of_ids(torch.tensor(window.ids), _WINDOW)
            try:
                conversations = self._conversations(window, number, context)
                rows = [row for one in conversations if (row := self._row(*one)) is not None]
                write_rows(folder, self._taught(rows, context))
            finally:
                self.model.unload_prefix(_WINDOW)
        return {"rows": len(rows)}

    def _conversations(self, window: Window, number: int, context: PrefixBatch) -> list[tuple[str, str]]:
        settings = self.settings
        draw = random.Random(f"{settings.seed} {number}")
        found = list(templated(window.passages, draw))
        if settings.own_questions:
            prompts = questions_to_write(window.passages, settings.own_questions, draw)
            asked = self._answers(prompts, context, draw.getrandbits(32), _QUESTION_TOKENS)
            questions = [question for question in asked if question] + list(seeds(window.passages))
            answers = self._answers(questions, context, draw.getrandbits(32), settings.max_row_length)
            found += zip(questions, answers, strict=True)
        return found

    def _answers(self, questions: Sequence[str], context: PrefixBatch, seed: int, length: int) -> list[str]:
        prompts = [self.tokenizer.chat.encode_prompt(_asked(question)) for question in questions]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return generate_answers(
                self.model,
                self.tokenizer,
                prompts,
                batch_size=self._batch_size,
                max_new_tokens=length,
                do_sample=True,
                prefix=context,
                progress=False,
            )

    def _row(self, question: str, answer: str) -> dict[str, Any] | None:
        """The row of a conversation; an answer that is too long is truncated. None if the question is too long."""
        encoded = self.tokenizer.chat.encode(Conversation([*_asked(question).messages, Message("assistant", answer)]))
        ids = encoded.input_ids[: self.settings.max_row_length]
        start = encoded.answer_start
        if not answer or len(ids) <= start:
            return None
        return {"input_ids": ids, "labels": [IGNORED_LABEL] * start + ids[start:]}

    def _taught(self, rows: Sequence[dict[str, Any]], context: PrefixBatch) -> Iterator[dict[str, Any]]:
        """The rows with the teacher's distributions, a pass of them in memory at a time."""
        for start in range(0, len(rows), self._batch_size):
            own = rows[start : start + self._batch_size]
            for row, (ids, logprobs) in zip(
                own, distributions(self.model, own, context, self.settings.top_k), strict=True
            ):
                teacher = {"teacher_ids": ids.flatten().tolist(), "teacher_logprobs": logprobs.flatten().tolist()}
                yield {**row, **teacher, "length": len(row["input_ids"])}


@torch.no_grad()
def distributions(
    model: ChatGLMForConditionalGeneration, rows: Sequence[dict[str, Any]], prefix: PrefixBatch, top_k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's distributions at the supervised tokens of each row.

    Args:
        rows: with `input_ids` and `labels`.

    Yields:
        The likeliest tokens, int64 `[positions, k]`, and their log-probabilities with that of all other tokens
        together, float32 `[positions, k + 1]`, on the CPU.
    """
    labels = torch.tensor([label for row in rows for label in row["labels"]])
    states = model.transformer(
        input_ids=torch.tensor([[index for row in rows for index in row["input_ids"]]], device=model.device),
        sequence_lengths=[len(row["input_ids"]) for row in rows],
        kept_positions=((labels != IGNORED_LABEL).nonzero().flatten() - 1).to(model.device),
        use_cache=False,
        prefix=prefix,
    ).last_hidden_state[0]
    supervised = [sum(label != IGNORED_LABEL for label in row["labels"]) for row in rows]
    for own in states[: sum(supervised)].split(supervised):
        logits = apply_linear(model.transformer.output_layer, own).float()
        ids = logits.topk(top_k, dim=-1).indices
        yield ids.cpu(), logprobs_of_classes(logits, ids).cpu()


def _checked(entry: Path) -> datasets.Dataset:
    rows = open_rows(entry)
    if set(rows.column_names) != _COLUMNS or len(rows) != read_facts(entry)["rows"]:
        raise ValueError(f"The cached rows in {entry} are damaged: remove this folder, and start again.")
    return rows


def _asked(question: str) -> Conversation:
    return Conversation([Message("user", question)])
