"""Flags of `chatglm-ptuning train`: those of the official ptuning scripts, and the kit's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.utils import logging

from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.tasks.arguments import TaskArguments
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.files import check_output_folder
from chatglm_ptuning.model.arguments import BaseArguments, is_plain_base
from chatglm_ptuning.prefix.latest import runs_folder
from chatglm_ptuning.training.distributed import prepare_processes
from chatglm_ptuning.training.head_start import HeadInit
from chatglm_ptuning.training.initialisation import PrefixInit
from chatglm_ptuning.training.sampler import SamplingStrategy
from chatglm_ptuning.training.trainer_flags import Optimizer, check_given, check_resolved
from chatglm_ptuning.tuning.methods import (
    LEARNING_RATES,
    LINEAR_LAYERS,
    LoraSettings,
    PromptEncoder,
    PromptSettings,
    TuningMethod,
)

logger = logging.get_logger(__name__)

_LORA = LoraSettings()
_SHORTEST = 64
"""Smallest limit on the tokens of a replayed row: the shortest question fits every chat format."""

RETIRED_FLAGS = {
    "use_fast_tokenizer": "the family has one tokenizer.",
    "use_auth_token": "log in by `hf auth login` instead.",
    "resize_position_embeddings": "rotary positions need no resizing.",
    "forced_bos_token": "prompts always start with the model's own tokens.",
    "lang": "it served multilingual translation models.",
    "trust_remote_code": "no remote code is ever run.",
    "pad_to_max_length": "batches are padded to their longest row; the loss is the same.",
    "ignore_pad_token_for_loss": "padding is never learned, and a real <unk> in an answer always is.",
    "sortish_sampler": "use --train_sampling_strategy group_by_length, which is the default.",
    "group_by_length": "it is the default; --train_sampling_strategy random turns it off.",
    "eval_accumulation_steps": "an evaluation keeps no logits that could fill the memory.",
    "logging_nan_inf_filter": "a loss that is not finite always ends the training.",
    "remove_unused_columns": "the rows have only the columns that the model takes.",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead.",
    "save_safetensors": "weights are always saved as safetensors.",
    "half_precision_backend": "there is one left, PyTorch's.",
    "fp16_backend": "there is one left, PyTorch's.",
    "cache_dir": "set the environment variable HF_HOME (MODELSCOPE_CACHE for --hub modelscope) instead.",
    "config_name": "the configuration is read from --model_name_or_path.",
    "tokenizer_name": "the tokenizer is read from --model_name_or_path.",
}
"""Flags of the official scripts that are accepted and have nothing left to do, with the reason."""


@dataclass
class ModelArguments(BaseArguments):
    """The base model and its prefix."""

    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={"help": "checkpoint to continue training from, or to evaluate: of this kit, official or PEFT"},
    )
    pre_seq_len: int | None = field(
        default=None,
        metadata={"help": "number of virtual tokens (default: the checkpoint's, the task's, or 128)"},
    )
    prefix_projection: bool = field(
        default=False, metadata={"help": "compute the prefix with a two-layer MLP during training"}
    )
    prefix_dropout: float = field(default=0.1, metadata={"help": "dropout on the prefix during training"})
    prefix_init: PrefixInit = field(
        default="data",
        metadata={"help": "first values: data or text (keys and values of real tokens), small, official (N(0, 1))"},
    )
    init_prefix_text: str | None = field(
        default=None,
        metadata={"help": "initialise the prefix with the keys and values of this text (implies --prefix_init text)"},
    )
    init_prefix: str | None = field(
        default=None,
        metadata={
            "help": "initialise the prefix with a trained one, such as one that several tasks share (--task_mixture)"
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the base (auto: bfloat16 or float16 on a GPU that has it)"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or flex_attention (default: sdpa)"}
    )

    def __post_init__(self) -> None:
        if is_plain_base(self.ptuning_checkpoint):
            self.ptuning_checkpoint = None
        if self.init_prefix_text is not None:
            self.prefix_init = "text"
        if self.prefix_init == "text" and not self.init_prefix_text:
            raise ValueError("--prefix_init text needs --init_prefix_text")
        if self.init_prefix is not None and (self.ptuning_checkpoint is not None or self.prefix_init == "text"):
            raise ValueError("--init_prefix, --ptuning_checkpoint and --init_prefix_text each say what the prefix "
                             "starts from; give one of them")  # fmt: skip
        if self.pre_seq_len is not None and self.pre_seq_len < 1:
            raise ValueError(f"--pre_seq_len must be at least 1, got {self.pre_seq_len}")


@dataclass
class DataArguments(TaskArguments):
    """Instruction files or tasks, their splits and limits."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "data files, folders, patterns or huggingface:OWNER/NAME to train on"}
    )
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "one number for each train_file: how often its rows are used in an epoch"}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "data files for --do_eval"})
    test_file: list[str] | None = field(
        default=None, metadata={"help": "data files for --do_predict (default: validation_file)"}
    )
    val_max_target_length: int | None = field(
        default=None, metadata={"help": "maximum number of tokens to generate (default: max_target_length)"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "maximum number of training rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "maximum number of evaluation rows"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "maximum number of rows to predict"})
    preprocessing_num_workers: int = field(default=1, metadata={"help": "number of processes that tokenise the rows"})
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "cache folder for tokenised rows (default: ~/.cache/chatglm_ptuning/data)"}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "ignore cached rows and tokenise again"})
    num_beams: int | None = field(default=None, metadata={"help": "number of beams (default: greedy decoding)"})
    compare_base: bool = field(
        default=False,
        metadata={"help": "with --do_predict: also score the base model without the prefix, and show its answers"},
    )
    train_split: str | None = field(default=None, metadata={"help": "split of the task to train on (default: train)"})
    eval_split: str | None = field(default=None, metadata={"help": "split of the task for --do_eval (default: dev)"})
    predict_split: str | None = field(
        default=None,
        metadata={"help": "split of the task for --do_predict (default: test, or dev if there is no test)"},
    )

    task_mixture: str | None = field(
        default=None, metadata={"help": "YAML file with several tasks that share one prefix (docs/tasks.md)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_mixture is not None and (self.task or self.train_file or self.validation_file or self.test_file):
            raise ValueError("--task_mixture names its own tasks and files: give no --task, --train_file, "
                             "--validation_file or --test_file")  # fmt: skip
        if self.task is not None and (self.train_file or self.validation_file or self.test_file):
            raise ValueError("--task brings its own files: give --task_data and no --train_file, --validation_file or "
                             "--test_file")  # fmt: skip
        if self.task is None and self.task_mixture is None and self.echo is not None:
            raise ValueError("--echo belongs to a --task or a --task_mixture")
        if self.task is None and (self.train_split or self.eval_split or self.predict_split):
            raise ValueError("--train_split, --eval_split and --predict_split belong to a --task")
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name} must be at least 2, got {getattr(self, name)}")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"--{name} must be at least 1 (leave it out for all rows), got {limit}")

    def chosen_task(self) -> Task:
        """The task that --task names, or that of the instruction files.

        Raises:
            ValueError: if there is no such task, its file is wrong, or no file is named.
        """
        if self.task is not None:
            return load_task(self.task)
        files = self.train_file or self.validation_file or self.test_file
        if not files:
            raise ValueError("give --task, or instruction files by --train_file, --validation_file or --test_file.")
        return self.setup_of_files(files).task

    def split(self, task: Task | None, kind: Literal["train", "dev", "test"]) -> Split:
        """The rows to train on, to evaluate on during training, or to test on.

        Args:
            task: the task that --task names; instruction files need none.

        Raises:
            ValueError: if the flags name no file, or the task has no such split.
        """
        limits = {"train": self.max_train_samples, "dev": self.max_eval_samples, "test": self.max_predict_samples}
        if self.task is not None:
            named = {"train": self.train_split, "dev": self.eval_split, "test": self.predict_split}
            return self.split_of_task(task, kind, named[kind], limits[kind])
        name = "train_file" if kind == "train" else "validation_file"
        files = getattr(self, name) if kind != "test" else self.test_file or self.validation_file
        if not files:
            asks = {"train": "--do_train", "dev": "--do_eval and --eval_strategy", "test": "--do_predict"}
            raise ValueError(f"--{name} is missing: {asks[kind]} reads its rows.")
        return Split(files, limit=limits[kind], weights=self.train_weights if kind == "train" else None)


@dataclass
class TuningArguments:
    """The tuning method, its settings and learning rates."""

    tuning: TuningMethod = field(
        default="ptuning_v2", metadata={"help": "tuning method (none: evaluate the plain base)"}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "default: the task's; else 1e-2 for a prefix (the official script has 2e-2) and head_only, "
                  "3e-2 for prompt, 1e-3 for p_tuning, 2e-4 for lora, 5e-5 for full"},
    )  # fmt: skip
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of a linear head (default: --learning_rate)"}
    )
    head_init: HeadInit = field(
        default="probe",
        metadata={"help": "first values of a linear head for texts or tokens: probe (logistic regression on the states "
                  "of the training rows before training) or random"},
    )  # fmt: skip
    lora_rank: int = field(default=_LORA.rank, metadata={"help": "LoRA: rank of the update matrices"})
    lora_alpha: float = field(default=_LORA.alpha, metadata={"help": "LoRA: the update is scaled by alpha / rank"})
    lora_dropout: float = field(default=_LORA.dropout, metadata={"help": "LoRA: dropout on the input"})
    lora_target: list[str] = field(
        default_factory=lambda: list(_LORA.targets),
        metadata={"help": f"LoRA: the layers, among {', '.join(LINEAR_LAYERS)}"},
    )
    prompt_encoder: PromptEncoder = field(
        default="mlp", metadata={"help": "P-Tuning: the network that makes the prompt"}
    )
    prompt_encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "P-Tuning: width of that network (default: the base's hidden_size)"}
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.lora_target if name not in LINEAR_LAYERS]
        if unknown or not self.lora_target:
            raise ValueError(f"--lora_target takes {', '.join(LINEAR_LAYERS)}, got {', '.join(unknown) or 'nothing'}")
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank must be at least 1, got {self.lora_rank}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")
        if self.prompt_encoder_hidden_size is not None and self.prompt_encoder_hidden_size < 1:
            raise ValueError(f"--prompt_encoder_hidden_size must be at least 1, got {self.prompt_encoder_hidden_size}")
        self.learning_rate_is_default = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.tuning]

    def lora(self) -> LoraSettings:
        """The settings of LoRA."""
        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_target))

    def prompt(self, pre_seq_len: int) -> PromptSettings:
        """The settings of soft prompts."""
        return PromptSettings(pre_seq_len, self.prompt_encoder, self.prompt_encoder_hidden_size)


@dataclass
class PrefixTrainingArguments(TuningArguments, Seq2SeqTrainingArguments):
    """transformers' training arguments with defaults for a prefix, and the tuning method."""

    output_dir: str | None = field(default=None, metadata={"help": "folder of the run (default: output/prefix)"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "start over in the folder of an earlier run; its checkpoints are removed"}
    )
    save_official_prefix: bool = field(
        default=False,
        metadata={"help": "write the prefix as the official pytorch_model.bin too, for programs that read only that"},
    )
    logging_steps: float = field(default=10, metadata={"help": "number of steps between log entries"})
    packing: bool | None = field(
        default=None,
        metadata={"help": "lay the rows of a step one after the other, without padding; the loss is the same (default: "
                  "true, except with --torch_compile and --neftune_noise_alpha)"},
    )  # fmt: skip
    max_tokens_per_pass: int | None = field(
        default=None,
        metadata={"help": "with --packing: tokens of one forward and backward pass; a step has as many passes as its "
                  "rows need (default: --per_device_train_batch_size times the longest row, at least 2048)"},
    )  # fmt: skip
    train_sampling_strategy: SamplingStrategy = field(
        default="group_by_length", metadata={"help": "order of the training rows"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "rows have only the columns that the model takes"}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "a loss that is not finite ends the training"}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "pinned memory (default: with a GPU)"}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "see TrainingArguments"})
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "experiment trackers, such as tensorboard or wandb; all for those that are installed"},
    )
    # Refused, with a message of the kit's own: the parser does not understand their types.
    liger_kernel_config: str | None = field(default=None, metadata={"help": "refused (docs/training_flags.md)"})
    parallelism_config: str | None = field(default=None, metadata={"help": "refused (docs/training_flags.md)"})
    optim: Optimizer = field(default="adamw_torch_fused", metadata={"help": "the optimizer"})
    label_smoothing_factor: float = field(
        default=0.0,
        metadata={"help": "share of the target that is spread over all tokens or labels; for the training loss only"},
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata={"help": "count the tokens of the training rows: no, all or non_padding", "nargs": "?",
                  "const": "all"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = str(runs_folder() / "prefix")
        check_output_folder(self.output_dir)
        TuningArguments.__post_init__(self)
        if self.tuning == "none" and self.do_train:
            raise ValueError("--tuning none trains nothing: leave --do_train out, or choose another --tuning.")
        check_given(self)
        self.include_num_input_tokens_seen = _counted_tokens(self.include_num_input_tokens_seen)
        if self.deepspeed and self.tuning != "ptuning_v2":
            raise ValueError(
                f"--deepspeed works with --tuning ptuning_v2 alone. Train {self.tuning} in one process or in several "
                "(scripts/launch.sh without --deepspeed)."
            )
        prepare_processes(self)
        Seq2SeqTrainingArguments.__post_init__(self)
        check_resolved(self)
        self._decide_packing()
        if super().n_gpu > 1:
            logger.warning(
                f"One process uses one GPU, so that {super().n_gpu - 1} GPUs are idle. NUM_GPUS of "
                "scripts/train.sh, or scripts/launch.sh, starts a process for each GPU."
            )

    def _decide_packing(self) -> None:
        """Sets `packing` where it was left open.

        Raises:
            ValueError: naming the flags that contradict one another.
        """
        reason = ""
        if self.torch_compile:
            reason = "--torch_compile would compile every step anew, as no two have rows of the same lengths"
        elif self.neftune_noise_alpha:
            reason = "--neftune_noise_alpha scales its noise by the length of a padded row"
        if self.packing and reason:
            raise ValueError(f"--packing: {reason}. Leave one of them out.")
        if self.packing is None:
            self.packing = not reason
        if self.max_tokens_per_pass is not None and not self.packing:
            raise ValueError("--max_tokens_per_pass is for --packing; a padded pass has one batch of rows.")
        if self.max_tokens_per_pass is not None and self.max_tokens_per_pass < 1:
            raise ValueError(f"--max_tokens_per_pass must be at least 1, got {self.max_tokens_per_pass}")

    @property
    def n_gpu(self) -> int:
        """Number of GPUs of this process: at most one. DataParallel would copy the base to all in every step."""
        return min(super().n_gpu, 1)


@dataclass
class GivenTrainingArguments(PrefixTrainingArguments):
    """The same, checked as they were given, for a run that another process will start: no device is prepared."""

    def __post_init__(self) -> None:
        TuningArguments.__post_init__(self)
        check_given(self)


def _counted_tokens(given: str | bool) -> str:
    """The value of --include_num_input_tokens_seen, which used to be yes or no."""
    name = {"true": "all", "false": "no"}.get(str(given).lower(), str(given))
    if name not in ("no", "all", "non_padding"):
        raise ValueError(f"--include_num_input_tokens_seen must be no, all or non_padding, got {given}")
    return name


@dataclass
class PreservationArguments:
    """How the abilities of the base are preserved and measured."""

    preserve_base: float = field(
        default=0.0,
        metadata={"help": "weight of the KL divergence from the base on general rows in the loss (default: 0)"},
    )
    preserve_mask_target: bool = field(
        default=False,
        metadata={"help": "leave the next token of a replayed row out of the divergence, so that it does not oppose "
                  "what is learned (arXiv 2605.29498, which replays the rows of the task)"},
    )  # fmt: skip
    preserve_file: list[str] | None = field(
        default=None, metadata={"help": "general rows to replay, in any dataset format (default: bundled ones)"}
    )
    preserve_eval_file: list[str] | None = field(
        default=None, metadata={"help": "general rows that are never replayed, to measure on (default: bundled ones)"}
    )
    preserve_batch_size: int | None = field(
        default=None, metadata={"help": "general rows per batch on every device (default: as many as of the task)"}
    )
    preserve_max_length: int = field(default=256, metadata={"help": "maximum number of tokens of a general row"})
    max_preserve_eval_samples: int = field(default=64, metadata={"help": "number of general rows to measure on"})
    report_drift: bool = field(
        default=True, metadata={"help": "measure at the end how far the model drifted from the base"}
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.preserve_base) and self.preserve_base >= 0):
            raise ValueError(f"--preserve_base must be 0 or a positive number, got {self.preserve_base:g}")
        if self.preserve_mask_target and not self.preserve_base:
            raise ValueError("--preserve_mask_target changes the divergence of --preserve_base: give that, too")
        for name, least in (("preserve_batch_size", 1), ("preserve_max_length", _SHORTEST),
                            ("max_preserve_eval_samples", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
