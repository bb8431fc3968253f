"""Pre-trains a small base model: vocabulary, samples, then weights; called by scripts/pretrain_nano.sh."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from chatglm_ptuning.files import write_atomically
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.model.vocabulary import SentencePieceVocabulary
from pretraining.corpus import Corpus, read_corpus
from pretraining.measure import held_out_loss
from pretraining.muon import Muon
from pretraining.samples import PackedRows, check_samples, train_vocabulary, write_samples

_HELD_OUT = 300


class Optimizers:
    """Muon for the matrices inside the layers, AdamW for everything else, under one learning-rate factor.

    On this model Muon reaches a loss in fewer tokens than AdamW alone.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, matrix_lr: float, other_lr: float) -> None:
        matrices, self.others = [], []
        for name, parameter in model.named_parameters():
            (matrices if parameter.ndim == 2 and ".layers." in name else self.others).append(parameter)
        self.parts = [
            Muon(matrices, lr=matrix_lr),
            torch.optim.AdamW(self.others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.peaks = [matrix_lr, other_lr]

    def step(self, factor: float) -> None:
        """One step at `factor` times the peak learning rates; clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.param_groups[0]["lr"] = factor * peak
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """States of both parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Loads what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def learning_rate_factor(step: int, progress: float, warmup: int, decay_share: float) -> float:
    """Linear warm-up, then constant, then a linear decay to zero over the last `decay_share` of the run.

    Args:
        progress: share of the run that is done, from 0 to 1.
    """
    return max(0.0, min(1.0, (step + 1) / warmup, (1 - progress) / decay_share))


def packed_mask(positions: torch.Tensor) -> torch.Tensor:
    """Attention mask of packed rows: a token sees those before it in its sample; bool `[rows, 1, length, length]`."""
    sample = (positions == 0).cumsum(-1)
    return (sample[:, None, :, None] == sample[:, None, None, :]).tril()


def packed_labels(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The ids, with -100 on the first token of every sample (no sample predicts the next one) and on padding."""
    return ids.masked_fill(positions == 0, -100)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; `auto` is bfloat16 wherever the hardware has arithmetic for it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def build_model(arguments: argparse.Namespace, vocabulary: SentencePieceVocabulary) -> ChatGLMForConditionalGeneration:
    """The model that `--initial_model` names, or a new ChatGLM3 in small, with random weights."""
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


def loss_function(model: ChatGLMForConditionalGeneration, autocast: torch.autocast) -> Callable[..., torch.Tensor]:
    """The loss of packed rows, from ids and positions."""

    def loss_of(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with autocast:
            return model(
                input_ids=ids,
                attention_mask=packed_mask(positions),
                position_ids=positions,
                labels=packed_labels(ids, positions),
                use_cache=False,
            ).loss

    return loss_of


def compiled(
    loss_of: Callable[..., torch.Tensor], model: ChatGLMForConditionalGeneration, shape: tuple[int, int]
) -> Callable[..., torch.Tensor]:
    """The same function compiled, or as it is where this machine cannot compile; tried on one row of zeros."""
    positions = torch.arange(shape[1], device=model.device).expand(shape).contiguous()
    candidate = torch.compile(loss_of, dynamic=False)
    try:
        candidate(torch.zeros_like(positions), positions).backward()
    except Exception as error:  # whatever the compiler lacks (a C++ compiler, triton), eager code runs without it
        print(f"not compiled: {str(error).splitlines()[0]}", flush=True)
        return loss_of
    finally:
        model.zero_grad(set_to_none=True)
    return candidate


class Run:
    """One training run in a folder, with a checkpoint every few minutes from which a killed run resumes.

    The run ends when `--tokens` or `--seconds` is reached, whichever is first; both count what earlier processes of
    the run did.
    """

    def __init__(self, arguments: argparse.Namespace, corpus: Corpus, vocabulary: SentencePieceVocabulary) -> None:
        self.arguments, self.vocabulary = arguments, vocabulary
        self.held_out = corpus.held_out[:_HELD_OUT]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(arguments, vocabulary).to(device).train()
        self.optimizers = Optimizers(self.model, arguments.matrix_lr, arguments.other_lr)
        dtype = compute_dtype(arguments.dtype, device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.state_file = arguments.output / "state.pt"
        self.step, self.seconds = 0, 0.0
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True, map_location=device)
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizers"])
            self.step, self.seconds = state["step"], state["seconds"]
        self.tokens_per_step = arguments.batch * arguments.row_length
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.log(event="start", parameters=parameters, device=str(device), dtype=str(dtype).removeprefix("torch."))

    def log(self, **record: object) -> None:
        """Prints a record and appends it to log.jsonl."""
        line = json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **record})
        print(line, flush=True)
        with (self.arguments.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        tokens = self.step * self.tokens_per_step / self.arguments.tokens
        return max(tokens, self.seconds / self.arguments.seconds if self.arguments.seconds else 0.0)

    def train(self, rows: PackedRows) -> None:
        """Trains to the end."""
        if self.progress >= 1:
            return
        arguments, device = self.arguments, self.model.device
        micro = min(arguments.micro_batch or arguments.batch, arguments.batch)
        if arguments.batch % micro:
            raise ValueError(f"--batch {arguments.batch} is no multiple of --micro_batch {micro}.")
        loss_of = loss_function(self.model, self.autocast)
        if arguments.compile:
            loss_of = compiled(loss_of, self.model, (micro, arguments.row_length))
        running, counted, saved = torch.zeros((), device=device), 0, time.monotonic()
        begun = time.monotonic() - self.seconds
        for epoch, ids, positions in rows.batches(arguments.batch, skip=self.step):
            factor = learning_rate_factor(self.step, self.progress, arguments.warmup, arguments.decay_share)
            batch = torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device)
            for part in zip(*(tensor.split(micro) for tensor in batch), strict=True):
                loss = loss_of(*part) * (micro / arguments.batch)
                loss.backward()
                running += loss.detach()
            self.optimizers.step(factor)
            self.step, counted, self.seconds = self.step + 1, counted + 1, time.monotonic() - begun
            done = self.progress >= 1
            if self.step % arguments.log_steps == 0 or done:
                tokens, mean = self.step * self.tokens_per_step, running.item() / counted
                self.log(tokens=tokens, epoch=epoch, loss=round(mean, 4), learning_rate_factor=round(factor, 4))
                running.zero_()
                counted = 0
            if done or time.monotonic() - saved > arguments.save_seconds or self.step % arguments.save_steps == 0:
                self.save()
                saved = time.monotonic()
            if done:
                break

    def save(self) -> None:
        """Writes the checkpoint, and logs the held-out loss."""
        loss = held_out_loss(self.model, self.vocabulary, self.held_out, self.arguments.row_length, self.autocast)
        self.log(held_out=asdict(loss))
        state = {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with write_atomically(self.state_file) as temporary:
            torch.save(state, temporary)

    def export(self) -> None:
        """Writes the model in float16 and its tokenizer as a base, into `model/`."""
        folder = self.arguments.output / "model"
        tokenizer = ChatGLMTokenizer(str(self.vocabulary.path), chat_format="chatglm3")
        self.model.generation_config.update(eos_token_id=tokenizer.chat.stop_ids, pad_token_id=0)
        self.model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    """The command line of the pre-training."""
    parser = argparse.ArgumentParser(prog="pretrain_nano.sh", description="Pre-train a small base model.")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="folders of text, see README.md")
    parser.add_argument("--fewclue", type=Path, help="folder with the FewCLUE tasks")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; a run that is there resumes")
    parser.add_argument("--initial_model", type=Path, help="base to continue from, with its vocabulary")
    parser.add_argument("--tokens", type=int, default=10**9, help="tokens to train on")
    parser.add_argument("--seconds", type=float, help="seconds to train for, without the encoding of the corpus")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--vocabulary", type=int, default=8000, help="pieces of a new vocabulary")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--ffn", type=int, default=704)
    parser.add_argument("--row_length", type=int, default=256, help="tokens of a row; longer documents are cut")
    parser.add_argument("--batch", type=int, help="rows of a step; 512 on a GPU and 64 on a CPU where not given")
    parser.add_argument("--micro_batch", type=int, help="rows of a forward pass, where memory is short")
    parser.add_argument("--variants", type=int, default=2, help="tries to make an instruction of each document")
    parser.add_argument("--echo_share", type=float, default=0.02, help="documents that are also written twice")
    parser.add_argument("--matrix_lr", type=float, default=1.2e-2, help="peak learning rate of Muon")
    parser.add_argument("--other_lr", type=float, default=4e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay_share", type=float, default=0.6, help="last share of the run, in which rates decay")
    parser.add_argument("--log_steps", type=int, default=20)
    parser.add_argument("--save_seconds", type=float, default=300)
    parser.add_argument("--save_steps", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (512 if torch.cuda.is_available() else 64)
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Makes the missing parts: the vocabulary (unless a base brings its own), the samples, then the weights.

    Raises:
        OSError, ValueError: if the folders of text, the base or the run's own folder cannot be used; the message says
            which file and why.
    """
    arguments.output.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(arguments.corpus, arguments.fewclue)
    vocabulary_file = arguments.output / "tokenizer.model"
    if arguments.initial_model is not None:
        shutil.copyfile(arguments.initial_model / vocabulary_file.name, vocabulary_file)
    elif not vocabulary_file.exists():
        texts = [*corpus.documents, *(turn["content"] for turns in corpus.conversations for turn in turns)]
        train_vocabulary(texts, vocabulary_file, arguments.vocabulary)
    samples = arguments.output / "samples"
    settings = {name: getattr(arguments, name) for name in ("row_length", "variants", "echo_share", "seed")}
    if not check_samples(samples, **settings):
        write_samples(corpus, vocabulary_file, samples, **settings)
    training = Run(arguments, corpus, SentencePieceVocabulary(vocabulary_file))
    training.train(PackedRows(samples, arguments.row_length, arguments.seed))
    training.export()


def main() -> None:
    """Pre-trains, or ends with the reason why not and exit code 1."""
    try:
        run(parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
