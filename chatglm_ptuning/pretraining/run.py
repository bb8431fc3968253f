"""Pre-trains chatglm-nano: vocabulary, then weights; called by scripts/pretrain_nano.sh."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.model.vocabulary import SentencePieceVocabulary
from chatglm_ptuning.prefix.files import write_atomically
from chatglm_ptuning.pretraining.corpus import Corpus, encode_document, pack, read_corpus, samples
from chatglm_ptuning.pretraining.muon import Muon


def train_vocabulary(corpus: Corpus, path: Path, size: int) -> None:
    """Trains a byte-pair vocabulary with byte fallback and no normalisation on the documents."""
    texts = (line for text in corpus.documents for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentencepiece_length=8,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=1,
    )
    path.with_suffix(".vocab").unlink()


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for everything else, under one learning-rate factor.

    On this model Muon reaches a loss in fewer tokens than AdamW alone.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, matrix_lr: float, other_lr: float) -> None:
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
        self.parts = [
            Muon(matrices, lr=matrix_lr),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.peaks = [matrix_lr, other_lr]

    def step(self, factor: float) -> None:
        """One step at `factor` times the peak learning rates; clears the gradients."""
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.param_groups[0]["lr"] = factor * peak
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """States of both parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Takes over what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def learning_rate_factor(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Linear warm-up, then constant, then a linear decay to zero over the last `decay_share` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay_share * steps))


@torch.no_grad()
def held_out_loss(model: ChatGLMForConditionalGeneration, rows: list[list[int]]) -> float:
    """Mean cross entropy per token, in nats, over the rows."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * (len(row) - 1)
        count += len(row) - 1
    model.train()
    return total / count


def build_model(arguments: argparse.Namespace, vocabulary: SentencePieceVocabulary) -> ChatGLMForConditionalGeneration:
    """The model to go on from, or a new ChatGLM3 in small, with ChatGLM3's settings except the sizes."""
    if arguments.initial_model is not None:
        model = ChatGLMForConditionalGeneration.from_pretrained(arguments.initial_model, dtype=torch.float32)
        model.config.name_or_path = ""
        return model
    config = ChatGLMConfig(
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_attention_heads=arguments.hidden // 32,
        kv_channels=32,
        ffn_hidden_size=arguments.ffn,
        padded_vocab_size=-(-len(vocabulary) // 32) * 32,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        seq_length=1024,
        attn_implementation="sdpa",
    )
    torch.manual_seed(arguments.seed)
    return ChatGLMForConditionalGeneration(config)


def train(arguments: argparse.Namespace, corpus: Corpus, vocabulary: SentencePieceVocabulary) -> None:
    """Trains to `arguments.tokens`, with a checkpoint every few minutes from which a killed run goes on."""
    model = build_model(arguments, vocabulary)
    optimizers = Optimizers(model, arguments.matrix_lr, arguments.other_lr)
    tokens_per_step = arguments.batch * arguments.row_length
    steps = arguments.tokens // tokens_per_step
    state_file = arguments.output / "state.pt"
    first, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        first, seconds = state["step"], state["seconds"]
    held_out = [encode_document(vocabulary, text)[: arguments.row_length] for text in corpus.held_out[:300]]
    stream = samples(corpus, vocabulary, arguments.seed, arguments.max_characters, arguments.instruction_share)
    rows = pack(stream, arguments.row_length)
    for _ in range(first * arguments.batch):
        next(rows)
    model.train()
    step_model = torch.compile(model) if arguments.compile else model
    log = (arguments.output / "log.jsonl").open("a", encoding="utf-8")
    running, since, saved = 0.0, time.monotonic(), time.monotonic()
    for step in range(first, steps):
        ids, positions = (
            torch.from_numpy(np.stack(part)) for part in zip(*itertools.islice(rows, arguments.batch), strict=True)
        )
        loss = step_model(
            input_ids=ids,
            attention_mask=mask_of(positions),
            position_ids=positions,
            labels=labels_of(ids, positions),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate_factor(step, steps, arguments.warmup, arguments.decay_share))
        running += loss.item()
        done = step + 1
        if done % arguments.log_steps == 0 or done == steps:
            now = time.monotonic()
            seconds, since = seconds + now - since, now
            record = {"step": done, "of": steps, "tokens": done * tokens_per_step, "seconds": round(seconds),
                      "loss": round(running / ((done - 1) % arguments.log_steps + 1), 4)}  # fmt: skip
            if done % (arguments.log_steps * 5) == 0 or done == steps:
                record["held_out_loss"] = round(held_out_loss(model, held_out), 4)
            running = 0.0
            print(json.dumps(record), flush=True)
            log.write(json.dumps(record) + "\n")
            log.flush()
        if time.monotonic() - saved > arguments.save_seconds or done == steps:
            saved = time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizers": optimizers.state_dict(),
                "step": done,
                "seconds": seconds,
            }
            with write_atomically(state_file) as temporary:
                torch.save(state, temporary)
    log.close()
    model.half().save_pretrained(arguments.output / "model")
    ChatGLMTokenizer(str(vocabulary.path), chat_format="chatglm3").save_pretrained(arguments.output / "model")


def mask_of(positions: torch.Tensor) -> torch.Tensor:
    """Which token sees which: those before it in its own sample; bool `[rows, 1, row_length, row_length]`."""
    sample = (positions == 0).cumsum(-1)
    return (sample[:, None, :, None] == sample[:, None, None, :]).tril()


def labels_of(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The ids, with -100 on the first token of every sample (no sample predicts the next one) and on padding."""
    return ids.masked_fill(positions == 0, -100)


def parse_arguments() -> argparse.Namespace:
    """The command line of the pre-training."""
    parser = argparse.ArgumentParser(description="Pre-train chatglm-nano.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with zh_documents.jsonl.gz and the splits")
    parser.add_argument("--fewclue", type=Path, required=True, help="folder with the FewCLUE tasks")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--initial_model", help="folder of a model to go on from, with its vocabulary")
    parser.add_argument("--compile", action="store_true", help="compile the model first; about a quarter faster")
    parser.add_argument("--tokens", type=int, default=9_000_000)
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--row_length", type=int, default=192)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--max_characters", type=int, default=150)
    parser.add_argument("--instruction_share", type=float, default=0.5)
    parser.add_argument("--matrix_lr", type=float, default=1e-2)
    parser.add_argument("--other_lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay_share", type=float, default=0.5)
    parser.add_argument("--log_steps", type=int, default=50)
    parser.add_argument("--save_seconds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Trains what is not there yet: the vocabulary (unless a model brings its own), then the weights."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(arguments.corpus, arguments.fewclue)
    vocabulary_file = arguments.output / "tokenizer.model"
    if arguments.initial_model is not None:
        shutil.copyfile(Path(arguments.initial_model) / vocabulary_file.name, vocabulary_file)
    elif not vocabulary_file.exists():
        train_vocabulary(corpus, vocabulary_file, arguments.vocabulary)
    train(arguments, corpus, SentencePieceVocabulary(vocabulary_file))


if __name__ == "__main__":
    main()
