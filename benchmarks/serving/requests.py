"""What is asked, the prefixes that are asked, and the answers of single runs and of one padded batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.turn import ChatTurn
from chatglm_ptuning.serving.answers import AnswerReader

PREFIX_TOKENS = 16
_NOISE = 1.0
"""Added to keys and values, so that the prefixes differ and their answers are long."""


@dataclass(frozen=True)
class Question:
    """A greedy request.

    Attributes:
        model: name of the prefix.
        max_tokens: most tokens of the answer.
    """

    model: str
    content: str
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Means of two normal distributions, whose standard deviations are a third of them."""

    question: int
    answer: int


ADVERTISEMENTS = Lengths(30, 75)
"""As AdvertiseGen has them."""
SHORT = Lengths(15, 12)


def make_prefixes(arguments: Any, folder: Path, count: int) -> list[str]:
    """Saves prefixes of random texts with noise; returns their names.

    Args:
        arguments: a `BaseArguments`.
    """
    model = arguments.load_model(pre_seq_len=PREFIX_TOKENS, prefix_projection=False)
    generator = torch.Generator().manual_seed(0)
    names = [f"prefix-{number:02}" for number in range(count)]
    encoder = model.transformer.prefix_encoder
    for name in names:
        ids = torch.randint(3, len(arguments.load_tokenizer()), (PREFIX_TOKENS,), generator=generator)
        model.init_prefix_from_ids(ids.to(model.device))
        values = encoder.key_values()
        noise = torch.randn(values.shape, generator=generator).to(values)
        encoder.set_key_values(values + _NOISE * noise)
        model.save_prefix(folder / name)
    return names


def make_questions(
    chat_format: ChatFormat, prefixes: Sequence[str], count: int, lengths: Lengths, seed: int
) -> list[Question]:
    """Questions of random text to the prefixes in turn; no two begin alike, so that none is answered from the cache."""
    draw, vocabulary = random.Random(seed), chat_format.vocabulary
    questions = []
    for number in range(count):
        length = _normal(draw, lengths.question)
        text = vocabulary.decode([draw.randrange(3, len(vocabulary)) for _ in range(length)], skip_special_tokens=True)
        content = "".join(filter(_is_plain, text)) or "?"
        questions.append(Question(prefixes[number % len(prefixes)], content, _normal(draw, lengths.answer)))
    return questions


def _normal(draw: random.Random, mean: int) -> int:
    return max(mean // 4, round(min(draw.gauss(mean, mean / 3), 1.75 * mean)), 1)


def _is_plain(character: str) -> bool:
    return character.isprintable() and character != "\ufffd"


@dataclass(frozen=True)
class Reference:
    """The answer that `generate` gives.

    Attributes:
        ids: without the stop token.
        finish_reason: OpenAI's.
    """

    ids: list[int]
    text: str
    finish_reason: str


class Generator:
    """`generate` on a base with prefixes.

    Args:
        arguments: a `BaseArguments`.
        folder: of the prefixes.
    """

    def __init__(self, arguments: Any, folder: Path, prefixes: Sequence[str]) -> None:
        self.chat_format: ChatFormat = arguments.load_tokenizer().chat
        self.model = arguments.load_model().eval()
        for name in prefixes:
            self.model.load_prefix(folder / name, name)

    def single_run(self, question: Question) -> Reference:
        """The answer to a question alone, in a chat."""
        prompt = ChatTurn(self.chat_format, question.content).input_ids()
        ((ids, finish_reason),) = self._read([question], self._generate([question], [prompt]))
        reader = AnswerReader(self.chat_format)
        text = "".join([*map(reader.add, ids), reader.finish()])
        return Reference(ids, text, finish_reason)

    def tokens_of(self, questions: Sequence[Question]) -> tuple[int, int]:
        """Tokens of one batch: those that were asked for, and all that were computed."""
        new = self.generate(questions)
        return sum(len(ids) for ids, _ in self._read(questions, new)), new.numel()

    def generate(self, questions: Sequence[Question]) -> torch.Tensor:
        """Greedy continuations of the texts as one batch, padded on the left, to the longest answer."""
        start, vocabulary = self.chat_format.start_ids, self.chat_format.vocabulary
        return self._generate(questions, [[*start, *vocabulary.encode(one.content)] for one in questions])

    @torch.no_grad()
    def _generate(self, questions: Sequence[Question], prompts: Sequence[list[int]]) -> torch.Tensor:
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        names = [question.model for question in questions]
        out = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            prefix=names if len(names) > 1 else names[0],
            max_new_tokens=max(question.max_tokens for question in questions),
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=list(self.chat_format.stop_ids),
            pad_token_id=self.chat_format.stop_ids[0],
        )
        return out[:, longest:].cpu()

    def _read(self, questions: Sequence[Question], new: torch.Tensor) -> list[tuple[list[int], str]]:
        found = []
        for question, row in zip(questions, new.tolist(), strict=True):
            ids = list(takewhile(lambda token: token not in self.chat_format.stop_ids, row[: question.max_tokens]))
            found.append((ids, "length" if len(ids) == question.max_tokens else "stop"))
        return found
