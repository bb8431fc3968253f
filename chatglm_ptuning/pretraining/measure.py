"""What a prefix can do on a base: sentiment of reviews, by several ways of tuning and several seeds.

    python -m chatglm_ptuning.pretraining.measure --corpus CORPUS --model data/chatglm-nano --output measured.json

The settings of every method were chosen on reviews_dev; the numbers are accuracies on reviews_test.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PromptTuningConfig, PromptTuningInit, get_peft_model
from torch import nn

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.files import write_atomically
from chatglm_ptuning.pretraining.corpus import read_jsonl

INSTRUCTION = "作者觉得怎么样？用一个词回答"
WORDS = {"positive": "不错", "negative": "太差"}
MAX_TEXT_TOKENS = 100
_GROUPED_BATCHES = 16


@dataclass
class Method:
    """A way of tuning: what is trained, how it answers, and its settings.

    Attributes:
        head_learning_rate: of the linear head where it is another than that of the rest.
    """

    head: bool
    tunes: str
    learning_rate: float
    steps: int
    head_learning_rate: float | None = None


METHODS = {
    "majority class": Method(False, "nothing", 0.0, 0),
    "base, same prompt": Method(False, "nothing", 0.0, 0),
    "prompt tuning (input only)": Method(False, "prompt", 5e-2, 800),
    "P-Tuning v2, verbaliser": Method(False, "prefix", 3e-2, 800),
    "linear head, no prefix": Method(True, "head", 1e-2, 800),
    "P-Tuning v2, linear head": Method(True, "prefix", 3e-2, 800, head_learning_rate=3e-3),
    "full fine-tuning, verbaliser": Method(False, "all", 5e-4, 800),
    "full fine-tuning, linear head": Method(True, "all", 5e-4, 800),
}


class Reviews:
    """Reviews as prompts that end where the answer begins."""

    def __init__(self, tokenizer: ChatGLMTokenizer, corpus: Path) -> None:
        self.tokenizer = tokenizer
        answers = [tokenizer.encode(word, add_special_tokens=False) for word in WORDS.values()]
        shared = 0
        while answers[0][shared] == answers[1][shared]:
            shared += 1
        self.lead = answers[0][:shared]
        self.label_ids = torch.tensor([answer[shared] for answer in answers])
        self.rows = {
            split: self._encode(read_jsonl(corpus / f"reviews_{split}.jsonl.gz")) for split in ("train", "dev", "test")
        }

    def _encode(self, rows: list[dict]) -> list[tuple[list[int], int]]:
        encode, token = self.tokenizer.encode, self.tokenizer.convert_tokens_to_ids
        line = encode("\n", add_special_tokens=False)
        start = [*map(token, ("[gMASK]", "sop", "<|user|>")), *line]
        instruction = encode(INSTRUCTION + "\n", add_special_tokens=False)
        end = [token("<|assistant|>"), *line, *self.lead]
        labels = list(WORDS)
        return [
            (start + instruction + encode(row["text"], add_special_tokens=False)[:MAX_TEXT_TOKENS] + end,
             labels.index(row["label"]))
            for row in rows
        ]  # fmt: skip


def batches(rows: list[tuple[list[int], int]], size: int, steps: int, rng: random.Random) -> Iterator[list]:
    """`steps` batches of rows of similar length, in an order drawn anew every epoch."""
    left: list[list[tuple[list[int], int]]] = []
    for _ in range(steps):
        if not left:
            drawn = rng.sample(rows, len(rows))
            for place in range(0, len(drawn) - size + 1, size * _GROUPED_BATCHES):
                group = sorted(drawn[place : place + size * _GROUPED_BATCHES], key=lambda row: len(row[0]))
                left += [group[start : start + size] for start in range(0, len(group), size)]
            rng.shuffle(left)
        yield left.pop()


class Classifier(nn.Module):
    """A language model that answers by the logits of two words, or by a linear head on the last position."""

    def __init__(self, model: nn.Module, label_ids: torch.Tensor, head: bool, hidden_size: int) -> None:
        super().__init__()
        self.model, self.label_ids = model, label_ids
        self.head = nn.Linear(hidden_size, len(label_ids)) if head else None

    def forward(self, rows: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[rows, 2]` and labels `[rows]`."""
        batch = PaddingCollator(0, "left")([{"input_ids": ids} for ids, _ in rows])
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        labels = torch.tensor([label for _, label in rows])
        if self.head is None:
            return self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1, self.label_ids], labels
        hidden = self.model.transformer(**inputs, use_cache=False).last_hidden_state[:, -1]
        return self.head(hidden), labels

    @torch.no_grad()
    def accuracy(self, rows: list[tuple[list[int], int]]) -> float:
        """Percent of rows answered right."""
        self.eval()
        rows = sorted(rows, key=lambda row: len(row[0]))
        right = 0
        for place in range(0, len(rows), 50):
            logits, labels = self(rows[place : place + 50])
            right += int((logits.argmax(-1) == labels).sum())
        return 100 * right / len(rows)


def build(method: Method, reviews: Reviews, arguments: argparse.Namespace, seed: int) -> Classifier:
    """A fresh base with what the method trains in front, around or on top of it; only that requires gradients."""
    torch.manual_seed(seed)
    length = arguments.pre_seq_len
    prefix = method.tunes == "prefix"
    # No dropout: all that a prefix of 16 can learn of one pass over the data it does not overfit.
    model = load_model(arguments.model, pre_seq_len=length if prefix else None, prefix_dropout=0.0)
    hidden_size = model.config.hidden_size
    if not prefix:
        model.requires_grad_(method.tunes == "all")
    else:
        ids = reviews.tokenizer.encode(INSTRUCTION + "。", add_special_tokens=False)
        model.init_prefix_from_ids(torch.tensor((ids * length)[:length]))
    if method.tunes == "prompt":
        model = get_peft_model(
            model,
            PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=length,
                prompt_tuning_init=PromptTuningInit.RANDOM,
                token_dim=hidden_size,
                num_layers=model.config.num_layers,
                num_attention_heads=model.config.num_attention_heads,
            ),
        )
        words = model.get_base_model().get_input_embeddings().weight
        ids = reviews.tokenizer.encode(INSTRUCTION + "。", add_special_tokens=False)
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(words[torch.tensor((ids * length)[:length])])
    return Classifier(model, reviews.label_ids, method.head, hidden_size)


def train(classifier: Classifier, method: Method, rows: list, seed: int, batch_size: int) -> None:
    """AdamW with a short warm-up and a linear decay."""
    head = [] if classifier.head is None else list(classifier.head.parameters())
    tuned = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    trained = tuned + head
    groups = [(tuned, method.learning_rate), (head, method.head_learning_rate or method.learning_rate)]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters], weight_decay=0.0
    )
    warmup = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / method.steps)
    )
    classifier.train()
    for batch in batches(rows, batch_size, method.steps, random.Random(seed)):
        logits, labels = classifier(batch)
        nn.functional.cross_entropy(logits, labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def measure(name: str, method: Method, reviews: Reviews, arguments: argparse.Namespace, seed: int) -> dict:
    """Trains and scores one method with one seed."""
    started = time.monotonic()
    if name == "majority class":
        counts = [label for _, label in reviews.rows["train"]]
        winner = max(set(counts), key=counts.count)
        test = reviews.rows["test"]
        return {"test": 100 * sum(label == winner for _, label in test) / len(test), "parameters": 0, "seconds": 0}
    classifier = build(method, reviews, arguments, seed)
    parameters = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    if method.steps:
        train(classifier, method, reviews.rows["train"], seed, arguments.batch)
    return {
        "dev": classifier.accuracy(reviews.rows["dev"][: arguments.dev_rows]),
        "test": classifier.accuracy(reviews.rows["test"]),
        "parameters": parameters,
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    """Measures the chosen methods over the chosen seeds; results are written after every one."""
    parser = argparse.ArgumentParser(description="Measure ways of tuning a base on the sentiment of reviews.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--pre_seq_len", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, help="instead of the method's own")
    parser.add_argument("--steps", type=int, help="instead of the method's own")
    parser.add_argument("--dev_rows", type=int, default=1000, help="score so many rows of reviews_dev")
    arguments = parser.parse_args()
    reviews = Reviews(load_tokenizer(arguments.model), arguments.corpus)
    results = json.loads(arguments.output.read_text("utf-8")) if arguments.output.exists() else {}
    for name in arguments.methods:
        method = copy.copy(METHODS[name])
        method.learning_rate = arguments.learning_rate or method.learning_rate
        method.steps = (arguments.steps or method.steps) if method.steps else 0
        for seed in arguments.seeds if method.steps else arguments.seeds[:1]:
            result = measure(name, method, reviews, arguments, seed)
            results.setdefault(name, {})[str(seed)] = result
            print(name, seed, result, flush=True)
            with write_atomically(arguments.output) as temporary:
                temporary.write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
        scores = [result["test"] for result in results[name].values()]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"{name}: {statistics.mean(scores):.1f} ± {spread:.1f}", flush=True)


if __name__ == "__main__":
    main()
