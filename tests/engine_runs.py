"""What the tests of the serving engine share: prompts, settings, and answers of single runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from chatglm_ptuning import ChatGLMForConditionalGeneration
from chatglm_ptuning.serving.engine.request import Token

VOCABULARY = 96


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random ids, none of them special."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ids_of(generation: Iterable[Token]) -> list[int]:
    """Waits for a whole answer."""
    return [token.id for token in generation]


class SingleRuns:
    """Greedy tokens of one prompt by `generate`, under a prefix; each is computed once."""

    def __init__(self, base: Path, prefixes: Mapping[str, Path]) -> None:
        self.model = ChatGLMForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        for name, path in prefixes.items():
            self.model.load_prefix(path, name)
        self._generate = cache(self._generate)

    def __call__(self, prompt: Sequence[int], count: int, name: str | None = None, penalty: float = 1.0) -> list[int]:
        return self._generate(tuple(prompt), count, name, penalty)[:count]

    def _generate(self, prompt: tuple[int, ...], count: int, name: str | None, penalty: float) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), prefix=self.model.prefix_batch(name), max_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0, repetition_penalty=penalty,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()
