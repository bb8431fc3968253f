"""Held-out loss of a base model: nats per token and per character, and by position in long documents."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from chatglm_ptuning import ChatGLMTokenizer
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.vocabulary import SentencePieceVocabulary
from pretraining.corpus import read_corpus

POSITION_BOUNDS = (0, 64, 128, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross entropy in nats."""

    per_token: float
    per_character: float


@torch.no_grad()
def token_losses(model: ChatGLMForConditionalGeneration, ids: Sequence[int]) -> torch.Tensor:
    """Cross entropy of every token but the first, in nats: float32 `[len(ids) - 1]`, on the CPU."""
    row = torch.tensor([ids], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").cpu()


def held_out_loss(
    model: ChatGLMForConditionalGeneration,
    vocabulary: SentencePieceVocabulary,
    documents: Sequence[str],
    max_tokens: int = 384,
    autocast: AbstractContextManager | None = None,
) -> HeldOutLoss:
    """Mean loss over documents, each cut to `max_tokens` ids and scored alone.

    The characters are those of the tokens scored.
    """
    start = [vocabulary.special_ids["[gMASK]"], vocabulary.special_ids["sop"]]
    total, tokens, characters = 0.0, 0, 0
    training = model.training
    model.eval()
    with autocast or nullcontext():
        for text in documents:
            ids = [*start, *vocabulary.encode(text), 2][:max_tokens]
            total += token_losses(model, ids).sum().item()
            tokens += len(ids) - 1
            characters += len(vocabulary.decode([index for index in ids[2:] if index != 2]))
    model.train(training)
    return HeldOutLoss(total / tokens, total / characters)


def loss_by_position(
    model: ChatGLMForConditionalGeneration,
    vocabulary: SentencePieceVocabulary,
    documents: Sequence[str],
    bounds: Sequence[int] = POSITION_BOUNDS,
) -> dict[str, float]:
    """Mean loss of the tokens between two positions, over the documents that reach the last bound."""
    start = [vocabulary.special_ids["[gMASK]"], vocabulary.special_ids["sop"]]
    rows = [[*start, *vocabulary.encode(text)][: bounds[-1] + 1] for text in documents]
    rows = [row for row in rows if len(row) > bounds[-1]]
    if not rows:
        raise ValueError(f"None of the {len(documents)} documents has {bounds[-1]} tokens.")
    model.eval()
    losses = torch.stack([token_losses(model, row) for row in rows]).mean(0)
    parts = {f"{low}-{high}": losses[low:high].mean().item() for low, high in itertools.pairwise(bounds)}
    return {"documents": len(rows), **parts}


def main() -> None:
    """Prints the held-out loss and the loss by position of one base as JSON."""

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True)
    parser.add_argument("--fewclue", type=Path)
    parser.add_argument("--max_position", type=int, default=768)
    arguments = parser.parse_args()
    model = ChatGLMForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    vocabulary = ChatGLMTokenizer.from_pretrained(arguments.model).vocabulary
    held_out = read_corpus(arguments.corpus, arguments.fewclue).held_out
    bounds = [bound for bound in POSITION_BOUNDS if bound <= arguments.max_position]
    result = {
        "held_out": asdict(held_out_loss(model, vocabulary, held_out[:300])),
        "by_position": loss_by_position(model, vocabulary, held_out, bounds),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
