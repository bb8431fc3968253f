"""Resolves the flags of a run to a frozen configuration, before data or weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.tasks.arguments import TaskSetup
from chatglm_ptuning.data.tasks.heads import ECHO_HEADS, LINEAR_HEADS, head_of, heads_of
from chatglm_ptuning.data.tasks.mixture import Mixture, read_mixture
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.candidates import CANDIDATE_ATTENTIONS
from chatglm_ptuning.evaluation.recorded import (
    TRAIN_SPLIT,
    described_tasks,
    record_of,
    recorded_details,
    recorded_head,
    recorded_reading,
    tasks_of,
)
from chatglm_ptuning.model.loading import best_device, choose_dtype
from chatglm_ptuning.prefix.export import check_room_for_export
from chatglm_ptuning.prefix.formats import adapter_type, read_prefix
from chatglm_ptuning.training.arguments import (
    DataArguments,
    ModelArguments,
    PrefixTrainingArguments,
    PreservationArguments,
)
from chatglm_ptuning.training.checkpoints import choose_checkpoint
from chatglm_ptuning.training.distributed import match_precision
from chatglm_ptuning.tuning.methods import PREFIX_METHODS, PROMPT_METHODS
from chatglm_ptuning.tuning.record import read_record


@dataclass(frozen=True)
class RunTask:
    """One task of a run.

    Attributes:
        setup: the task and the head that solves it.
        train, dev, test: the splits that the run needs; None for those that it does not.
    """

    setup: TaskSetup
    train: Split | None = None
    dev: Split | None = None
    test: Split | None = None

    @property
    def task(self) -> Task:
        """The task itself."""
        return self.setup.task


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, without contradictions. `resolve` makes it.

    Attributes:
        base: the base model and the prefix; `pre_seq_len` is the number of virtual tokens to train, None for none.
        data: cache, workers and how predictions are made.
        schedule: the method, and the Trainer's arguments.
        preserve: how the base is preserved.
        tasks: the one task, or those of the mixture. Instruction files are a task, too.
        mixture: None for a single task.
        resume_from: the checkpoint of this run to resume from.
    """

    base: ModelArguments
    data: DataArguments
    schedule: PrefixTrainingArguments
    preserve: PreservationArguments
    tasks: tuple[RunTask, ...]
    mixture: Mixture | None = None
    resume_from: Path | None = None

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.schedule.output_dir)

    @property
    def trains_prefix(self) -> bool:
        """Whether the run trains keys and values of virtual tokens."""
        return _trains_prefix(self.schedule)

    @property
    def replays(self) -> bool:
        """Whether general rows are replayed in training."""
        return self.schedule.do_train and self.preserve.preserve_base > 0

    @property
    def measures_drift(self) -> bool:
        """Whether the run ends with a report on how far the model moved from its base."""
        tuned = self.schedule.do_train or (self.schedule.do_eval and self.base.ptuning_checkpoint is not None)
        return self.preserve.report_drift and self.schedule.tuning in PREFIX_METHODS and tuned

    def details(self, chat_format: str | None = None, rows: int = 0) -> dict[str, Any]:
        """What checkpoints record of the run beside the weights.

        Args:
            rows: number of training rows.
        """
        training: dict[str, Any] = {
            "tuning": self.schedule.tuning,
            "rows": rows,
            "learning_rate": self.schedule.learning_rate,
            "prefix_init": self.base.init_prefix or self.base.prefix_init,
            "seed": self.schedule.seed,
        }
        details = {"chat_format": chat_format, "task": None, "training": training}
        setups = [task.setup for task in self.tasks]
        heads = {
            setup.task.name: {"head": setup.head.name, "labels": setup.head.outputs(setup.task)} for setup in setups
        }
        if self.mixture is not None:
            training |= record_of(setups)
            return details | {"task": Path(self.data.task_mixture).stem, "tasks": heads}
        name = self.tasks[0].task.name
        if self.data.task is None:
            return details | ({"task": name} if self.data.train_file else {})
        if self.tasks[0].train is not None:
            training[TRAIN_SPLIT] = self.tasks[0].train.name
        training |= record_of(setups)
        return details | {"task": name, **heads[name]}


def resolve(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PrefixTrainingArguments,
    preserve_args: PreservationArguments | None = None,
) -> RunConfig:
    """Decides what the flags leave open, by the checkpoint, the tasks and the mixture file that they name.

    The learning rate and DeepSpeed's precision are set in `args`, which do not change afterwards.

    Raises:
        ValueError: if flags contradict one another, the checkpoint or the task; the message names both.
        FileNotFoundError: if the base, a checkpoint or a task file is not there.
    """
    preserve_args = preserve_args or PreservationArguments()
    sources = {name: getattr(model_args, name) for name in ("ptuning_checkpoint", "init_prefix")}
    model_args = replace(
        model_args, **{name: model_args.find_prefix(source) for name, source in sources.items() if source is not None}
    )
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do: give --do_train, --do_eval or --do_predict.")
    _check_flags(model_args, data_args, args, preserve_args)
    _check_best_metric(data_args, args)
    resume_from = choose_checkpoint(args)
    mixture = None
    if data_args.task_mixture is not None:
        mixture = read_mixture(data_args.task_mixture)
        tasks = _tasks_of_mixture(mixture, model_args, data_args, args)
    else:
        tasks = (_single_task(model_args, data_args, args),)
        if data_args.task is not None and args.tuning == "ptuning_v2" and args.learning_rate_is_default:
            args.learning_rate = tasks[0].task.learning_rate
    base = replace(model_args, pre_seq_len=_prefix_length(model_args, args, tasks))
    if args.tuning == "full" and base.dtype == "auto":
        # Weights that are trained must be in float32: small steps are rounded away in 16 bits.
        base = replace(base, dtype="float32")
    dtype = choose_dtype(base.dtype, best_device(), base.load_config().hidden_size)
    match_precision(args, dtype, base.quantization_bit)
    config = RunConfig(base, data_args, args, preserve_args, tasks, mixture, resume_from)
    for task in tasks:
        _check_attention(base, task)
        _check_smoothing(args, task)
    if resume_from is not None:
        _check_same_tasks(config, resume_from)
    return config


def _trains_prefix(args: PrefixTrainingArguments) -> bool:
    return args.do_train and args.tuning == "ptuning_v2"


def _check_flags(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PrefixTrainingArguments,
    preserve_args: PreservationArguments,
) -> None:
    """Refuses flags that contradict one another."""
    checkpoint = model_args.ptuning_checkpoint
    zero3 = bool(args.deepspeed) and args.hf_deepspeed_config.is_zero3()
    if args.use_cpu and torch.accelerator.is_available():
        raise ValueError(
            "--use_cpu does not move the base off the GPU: set the environment variable CUDA_VISIBLE_DEVICES= to hide "
            "the GPUs instead."
        )
    if args.eval_on_start and not args.do_eval:
        raise ValueError("--eval_on_start needs --do_eval or --eval_strategy, and rows to evaluate on.")
    if checkpoint is not None and args.tuning == "none":
        raise ValueError(f"--tuning none is the plain base: leave --ptuning_checkpoint {checkpoint} out.")
    if model_args.init_prefix is not None and not _trains_prefix(args):
        raise ValueError(
            "--init_prefix gives the first values of a prefix to train: it needs --do_train and --tuning ptuning_v2. "
            "To evaluate a prefix, name it by --ptuning_checkpoint."
        )
    if not args.do_train and checkpoint is None and model_args.pre_seq_len and args.tuning != "none":
        raise ValueError(
            f"--pre_seq_len {model_args.pre_seq_len} without --do_train needs a --ptuning_checkpoint: an untrained "
            "prefix is random. Without --pre_seq_len the plain base is used."
        )
    if args.save_official_prefix:
        if args.tuning not in PREFIX_METHODS:
            raise ValueError(
                f"--save_official_prefix needs --tuning {', '.join(PREFIX_METHODS)}, which train a prefix; got "
                f"{args.tuning}."
            )
        check_room_for_export(Path(args.output_dir))
    if data_args.compare_base:
        record = None if args.do_train or checkpoint is None else read_record(checkpoint)
        if (args.tuning if record is None else record.tuning) == "full":
            raise ValueError(
                "--compare_base needs the plain base, which --tuning full changes: score it in a run of its own, with "
                "--tuning none."
            )
    if preserve_args.preserve_base > 0:
        if args.neftune_noise_alpha:
            raise ValueError(
                "--preserve_base does not go with --neftune_noise_alpha, whose noise would be in the answers of the "
                "base, too. Give one of them."
            )
        if args.tuning not in PREFIX_METHODS:
            raise ValueError(
                f"--preserve_base needs --tuning {', '.join(PREFIX_METHODS)}, which freeze the base; got {args.tuning}."
            )
        if zero3:  # takes the output layer away before the backward pass computes logits again
            raise ValueError(
                "--preserve_base does not work with ZeRO-3, which partitions the base: use ds_config/zero2.json, with "
                "--quantization_bit 4 or 8 if the base does not fit one GPU, or --preserve_base 0."
            )
    if data_args.task_mixture is not None:
        if args.do_predict:
            raise ValueError(
                "--task_mixture does not go with --do_predict: score each task by `chatglm-ptuning evaluate --task "
                "NAME --task_data FOLDER --ptuning_checkpoint OUTPUT_DIR`."
            )
        if zero3:
            raise ValueError(
                "--task_mixture does not work with ZeRO-3, which would partition the heads: use ds_config/zero2.json, "
                "with --quantization_bit 4 or 8 if the base does not fit one GPU."
            )
        if args.tuning != "ptuning_v2":
            raise ValueError(f"--task_mixture trains a prefix: --tuning ptuning_v2, not {args.tuning}.")


# ---- tasks ----

_NEEDED_FOR = {"train": "do_train", "dev": "do_eval", "test": "do_predict"}
"""Kind of split -> the flag that needs it."""


def _single_task(model_args: ModelArguments, flags: DataArguments, args: PrefixTrainingArguments) -> RunTask:
    """The task of instruction files; or the task that --task names, with the head of --head or of the checkpoint."""
    checkpoint = model_args.ptuning_checkpoint
    kinds = [kind for kind in ("train", "dev", "test") if getattr(args, _NEEDED_FOR[kind])]
    if flags.task is None:
        setup = flags.setup_of_files(next(flags.split(None, kind) for kind in kinds).places)
    elif checkpoint is None:
        task = load_task(flags.task)
        head = head_of(task, flags.head)
        head.check(task)
        setup = flags.setup_of_task(task, head)
    else:
        task, details = load_task(flags.task), recorded_details(checkpoint, model_args)
        head = heads_of(task)[recorded_head(details, task, flags.head, checkpoint)]
        setup = flags.setup_of_task(task, head, recorded_reading(details, task, checkpoint))
    if flags.compare_base and args.do_predict and setup.head.name in LINEAR_HEADS:
        name = setup.head.name.replace("_", " ")
        raise ValueError(f"--compare_base: the base has no {name} head; compare it by --head generation.")
    return RunTask(setup, **{kind: flags.split(setup.task, kind) for kind in kinds})


def _tasks_of_mixture(
    mixture: Mixture, model_args: ModelArguments, flags: DataArguments, args: PrefixTrainingArguments
) -> tuple[RunTask, ...]:
    """The tasks of a mixture file; the flags hold for each of them."""
    if flags.echo and not any(entry.head in ECHO_HEADS for entry in mixture.tasks):
        raise ValueError(
            f"--echo true is for the heads {' and '.join(ECHO_HEADS)}, and no task in {flags.task_mixture} is solved "
            "by one. Leave --echo out."
        )
    checkpoint = model_args.ptuning_checkpoint
    details = None if checkpoint is None else recorded_details(checkpoint, model_args)
    tasks = []
    for entry in mixture.tasks:
        own = replace(flags, task_mixture=None, task=entry.task.name, task_data=entry.task_data,
                      echo=flags.echo if entry.head in ECHO_HEADS else None)  # fmt: skip
        trained = None if details is None else recorded_reading(details, entry.task, checkpoint)
        train_limit = entry.max_train_samples or flags.max_train_samples
        eval_limit = entry.max_eval_samples or flags.max_eval_samples
        tasks.append(
            RunTask(
                own.setup_of_task(entry.task, heads_of(entry.task)[entry.head], trained),
                own.split_of_task(entry.task, "train", entry.train_split, train_limit) if args.do_train else None,
                own.split_of_task(entry.task, "dev", entry.eval_split, eval_limit) if args.do_eval else None,
            )
        )
    return tuple(tasks)


def _check_attention(base: ModelArguments, task: RunTask) -> None:
    """Refuses an attention implementation that cannot predict by the head of a task."""
    implementation, head = base.attn_implementation, task.setup.head
    if implementation in (None, *CANDIDATE_ATTENTIONS) or not (head.masks_candidates and (task.dev or task.test)):
        return
    raise ValueError(
        f"--attn_implementation {implementation} does not work for {task.task.name} with the head {head.name}: its "
        f"candidate answers are scored with a mask that only {' and '.join(CANDIDATE_ATTENTIONS)} take. Give one of "
        "these, or leave --do_eval and --do_predict out."
    )


def _check_smoothing(args: PrefixTrainingArguments, task: RunTask) -> None:
    """Refuses label smoothing for a head without classes of which one is right."""
    head = task.setup.head
    if args.do_train and args.label_smoothing_factor and not head.smooths_labels:
        others = [name for name, other in heads_of(task.task).items() if other.smooths_labels]
        raise ValueError(
            f"--label_smoothing_factor {args.label_smoothing_factor:g} does not work for {task.task.name} with the "
            f"head {head.name}, whose outputs are not classes of which one is right. Leave it out"
            f"{', or use --head ' + ' or '.join(others) if others else ''}."
        )


def _check_best_metric(data_args: DataArguments, args: PrefixTrainingArguments) -> None:
    """Refuses to choose checkpoints by a score that no evaluation computes."""
    metric = args.metric_for_best_model
    computes_loss_alone = not (data_args.task or data_args.task_mixture or args.predict_with_generate)
    if args.do_train and metric is not None and computes_loss_alone and metric.removeprefix("eval_") != "loss":
        raise ValueError(
            f"--metric_for_best_model {metric} is a score of generated answers: give --predict_with_generate, too, or "
            "--metric_for_best_model loss."
        )


# ---- checkpoints ----


def _check_same_tasks(config: RunConfig, checkpoint: Path) -> None:
    """Refuses to resume a checkpoint of other tasks, or of other labels of the same task."""
    before, now = tasks_of(recorded_details(checkpoint, config.base)), tasks_of(config.details())
    if before != now:
        raise ValueError(
            f"{checkpoint} is from a run on {described_tasks(before)}, and this one is on {described_tasks(now)}: "
            "name another --output_dir, or start over by --overwrite_output_dir without --resume_from_checkpoint."
        )


def _prefix_length(model_args: ModelArguments, args: PrefixTrainingArguments, tasks: tuple[RunTask, ...]) -> int | None:
    """The number of virtual tokens to train: that of the checkpoint, of the flag, or of the tasks."""
    given, source = model_args.pre_seq_len, model_args.init_prefix or model_args.ptuning_checkpoint
    if source is not None and _is_prefix(Path(source)) and (args.do_train or given is not None):
        found = read_prefix(source, model_args.load_config().prefix_shape).metadata.pre_seq_len
        if given not in (None, found):
            raise ValueError(
                f"--pre_seq_len is {given}, but the prefix in {source} has {found} virtual tokens. Leave --pre_seq_len "
                "out: the size is read from the checkpoint."
            )
        given = found
    if not args.do_train or args.tuning not in PREFIX_METHODS:
        return None
    return given or max(task.task.pre_seq_len for task in tasks)


def _is_prefix(path: Path) -> bool:
    record = read_record(path) if path.is_dir() else None
    return adapter_type(path) != "LORA" if record is None else record.tuning in PROMPT_METHODS
