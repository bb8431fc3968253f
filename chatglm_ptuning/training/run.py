"""`chatglm-ptuning train`, in the order of its steps: settings, data, model, training, evaluation, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.data.cache import TokenCache
from chatglm_ptuning.data.collate import PackingCollator, PaddingCollator
from chatglm_ptuning.data.dataset import Loader, Split, lengths_of, shared_rows
from chatglm_ptuning.data.report import too_long_for_base
from chatglm_ptuning.data.tasks.arguments import submission_variant
from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads.head import Head, Prediction
from chatglm_ptuning.data.tasks.submission import can_submit, write_submission
from chatglm_ptuning.evaluation.inference import InferenceSettings, predict, predict_beside_base
from chatglm_ptuning.evaluation.report import head_settings, print_scores, score_task, write_report
from chatglm_ptuning.files import write_lines
from chatglm_ptuning.model.modeling_tasks import ChatGLMForMultipleTasks
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.training.arguments import (
    RETIRED_FLAGS,
    DataArguments,
    ModelArguments,
    PrefixTrainingArguments,
    PreservationArguments,
)
from chatglm_ptuning.training.checkpoints import remove_checkpoints
from chatglm_ptuning.training.command import keep, reported, train_and_save
from chatglm_ptuning.training.config import RunConfig, RunTask, resolve
from chatglm_ptuning.training.head_start import start_head
from chatglm_ptuning.training.mixture import MixtureTrainer, OneTaskCollator
from chatglm_ptuning.training.preservation import (
    GeneralRows,
    Replay,
    drift_report,
    read_general_rows,
)
from chatglm_ptuning.training.report import print_samples
from chatglm_ptuning.training.sampler import MixedRows
from chatglm_ptuning.training.trainer import PrefixTrainer, tokens_per_pass
from chatglm_ptuning.training.tuning import start_tuning
from chatglm_ptuning.tuning.tuning import Tuning

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

TRAIN_FLAGS = (ModelArguments, DataArguments, PrefixTrainingArguments, PreservationArguments)
"""The dataclasses that the command's flags fill."""
_SAMPLES_SHOWN = 3


def main(argv: Sequence[str]) -> None:
    """Entry of the command; user errors end it with a message and exit code 1, SIGTERM with 143."""
    model_args, data_args, args, preserve_args = parse_arguments(
        "chatglm-ptuning train",
        "Train a P-Tuning v2 prefix, or by another --tuning; evaluate it, and generate with it.",
        TRAIN_FLAGS,
        argv,
        RETIRED_FLAGS,
    )
    with reported(args):
        run(resolve(model_args, data_args, args, preserve_args))


def run(config: RunConfig) -> None:
    """Runs training, evaluation and predictions as configured.

    Raises:
        ValueError: naming file and line of faults in the data; if base, checkpoint and data do not fit.
        TrainingStopped: with advice, if the training cannot continue.
    """
    args = config.schedule
    if args.do_train and args.overwrite_output_dir and config.resume_from is None and args.process_index == 0:
        # Before anything can fail: a restarted job must not resume from the checkpoints of the earlier run.
        remove_checkpoints(config.output)
    tokenizer = config.base.load_tokenizer()
    # Data first: an error in a file shows before minutes go into loading the base.
    data = load_data(config, tokenizer)
    tuning = load_base(config, data, tokenizer)
    if too_long := too_long_for_base(data.lengths(), tuning.model.config.seq_length):
        logger.warning(too_long)
    trainer = make_trainer(config, data, tuning, tokenizer)
    if args.do_train:
        train(config, data, trainer)
    if args.do_eval:
        keep(trainer, "eval", trainer.last_evaluation())
    if args.do_predict:
        predict_test(config, data, trainer)
    if data.general.held_out is not None:
        measure_drift(config, data, trainer)


# ---- data ----


@dataclass(frozen=True)
class TaskData:
    """The data of one task, as far as the run needs it.

    Attributes:
        head: encodes and predicts.
        train, dev: rows to learn, and rows whose loss an evaluation computes.
        watched: examples that an evaluation predicts and scores.
        tested: examples to predict at the end.
        may_submit: whether the predictions on them make a submission to a benchmark.
    """

    head: Head
    train: datasets.Dataset | None = None
    dev: datasets.Dataset | None = None
    watched: Sequence[Example] = ()
    tested: Sequence[Example] = ()
    may_submit: bool = False


@dataclass(frozen=True)
class RunData:
    """The data of a run: of every task by its name, and general rows."""

    tasks: Mapping[str, TaskData]
    general: GeneralRows

    def lengths(self) -> list[int]:
        """The number of tokens of every row to learn or to evaluate."""
        parts = [rows for task in self.tasks.values() for rows in (task.train, task.dev) if rows is not None]
        return [length for rows in parts for length in lengths_of(rows)]

    def train_rows(self, mixture: bool) -> Any:
        """The rows to learn, of all tasks of a mixture together; empty if nothing is trained."""
        found = {name: task.train for name, task in self.tasks.items() if task.train is not None}
        return MixedRows(found) if mixture else next(iter(found.values()), [])


def load_data(config: RunConfig, tokenizer: ChatGLMTokenizer) -> RunData:
    """Reads the rows of every task, and general rows.

    Raises:
        ValueError: naming file and line of a faulty row.
    """
    flags, args = config.data, config.schedule
    loader = Loader(
        TokenCache(flags.data_cache_dir, flags.overwrite_cache),
        flags.skip_bad_rows,
        args.seed,
        flags.preprocessing_num_workers,
    )
    tasks = {task.task.name: _load_task(config, task, loader, tokenizer) for task in config.tasks}
    if config.mixture is not None and args.should_save:
        _print_mixture(config, tasks)
    strict = replace(loader, skip_bad_rows=0)  # the flag is about the rows of the task
    general = read_general_rows(
        config.preserve,
        tokenizer,
        strict,
        replays=config.replays,
        measures=config.measures_drift,
        ignored_columns=flags.ignored_columns,
    )
    return RunData(tasks, general)


def _load_task(config: RunConfig, task: RunTask, loader: Loader, tokenizer: ChatGLMTokenizer) -> TaskData:
    flags, args = config.data, config.schedule
    head = task.setup.make_head(tokenizer)
    train = None if task.train is None else _load_rows(config, task, loader, head, task.train)
    dev = None if task.dev is None else _load_rows(config, task, loader, head, task.dev)
    if train is not None and dev is not None and args.should_save and (count := shared_rows(train, dev)):
        print(f"warning: {count} rows of the validation data are in the training data too")
    watched, tested, may_submit = [], [], False
    # Generating answers to instructions takes long, so an evaluation does it only on request.
    if task.dev is not None and (_is_of_registry(config) or args.predict_with_generate):
        watched, _ = loader.make_ready(head, loader.read(task.task, task.dev))
    if task.test is not None:
        found = loader.read(task.task, task.test)
        whole = task.test.limit is None and flags.subjects is None and not found.bad_rows.count
        may_submit = whole and can_submit(task.task, found.examples)
        tested, _ = loader.make_ready(head, found)
    return TaskData(head, train, dev, watched, tested, may_submit)


def _load_rows(config: RunConfig, task: RunTask, loader: Loader, head: Head, split: Split) -> datasets.Dataset:
    found = loader.rows(head, split)
    if config.schedule.should_save:
        places = ", ".join(split.places)
        if _is_of_registry(config):
            places = f"{task.task.name} ({task.task.title}), {split.name} in {places}, head {head.name}"
        print(f"{places}\n{found.summary()}")
    return found.rows


def _is_of_registry(config: RunConfig) -> bool:
    """Whether the run is on tasks, and not on the instruction files that flags name."""
    return config.mixture is not None or config.data.task is not None


def _print_mixture(config: RunConfig, tasks: Mapping[str, TaskData]) -> None:
    sizes = [len(task.train) for task in tasks.values() if task.train is not None]
    shares = config.mixture.probabilities(sizes) if sizes else [None] * len(tasks)
    for (name, task), share in zip(tasks.items(), shares, strict=True):
        parts = [] if share is None else [f"train {len(task.train)} rows, {share:.1%} of the steps"]
        parts += [f"evaluate {len(task.watched)} examples"] if task.watched else []
        print(f"{name}, head {task.head.name}: {'; '.join(parts)}")


# ---- model ----


def load_base(config: RunConfig, data: RunData, tokenizer: ChatGLMTokenizer) -> Tuning:
    """Loads the base, puts the heads of the tasks on it, and prepares what is trained.

    Raises:
        FileNotFoundError, ValueError, ImportError: if base, method and checkpoint do not fit.
    """
    base = config.base
    heads = {name: task.head.model_settings(task.head.task) for name, task in data.tasks.items()}
    model = base.load_model(
        pre_seq_len=base.pre_seq_len if config.trains_prefix else None,
        prefix_projection=base.prefix_projection,
        prefix_dropout=base.prefix_dropout,
        dtype=base.dtype,
        attn_implementation=base.attn_implementation,
        **({} if config.mixture else next(iter(heads.values()))),
    )
    if config.mixture is not None:
        model = ChatGLMForMultipleTasks(model, heads)
    return start_tuning(model, config, tokenizer, data.train_rows(config.mixture is not None))


def make_trainer(config: RunConfig, data: RunData, tuning: Tuning, tokenizer: ChatGLMTokenizer) -> PrefixTrainer:
    """The Trainer for one task, or for a mixture of several."""
    args = config.schedule
    rows = data.train_rows(config.mixture is not None)
    collate = PackingCollator() if args.packing else PaddingCollator(tokenizer.pad_token_id, "right")
    tokens = tokens_per_pass(args, rows)
    common = {
        "model": tuning.model,
        "args": args,
        "train_dataset": rows or None,
        "tuning": tuning,
        "details": config.details(tokenizer.chat_format, len(rows)),
        "replay": _replay(config, data, tokenizer, tokens),
        "max_tokens_per_pass": tokens,
    }

    def score(name: str) -> tuple[dict[str, float], str]:
        """The scores of a task's watched examples, and the name of its own metric."""
        task = data.tasks[name]
        model = tuning.model.for_task(name) if config.mixture else tuning.model
        settings = inference_settings(config)
        found = predict(model, task.head, task.watched, settings, under_engine=trainer.under_engine)
        return score_task(task.head.task, task.watched, found).metrics, task.head.task.metric

    if config.mixture is not None:
        trainer = MixtureTrainer(
            **common,
            data_collator=OneTaskCollator(collate),
            eval_dataset={name: MixedRows({name: task.dev}) for name, task in data.tasks.items() if task.dev} or None,
            train_sizes=rows.sizes,
            probabilities=config.mixture.probabilities(list(rows.sizes.values())) if args.do_train else [],
            score=score,
        )
    else:
        ((name, task),) = data.tasks.items()
        trainer = PrefixTrainer(
            **common,
            data_collator=collate,
            eval_dataset=task.dev or None,
            generation_metrics=(lambda: score(name)[0]) if task.watched else None,
        )
    return trainer


def _replay(config: RunConfig, data: RunData, tokenizer: ChatGLMTokenizer, tokens: int) -> Replay | None:
    if data.general.replayed is None:
        return None
    return Replay(
        data.general.replayed,
        config.preserve.preserve_base,
        tokenizer.pad_token_id,
        batch_size=config.preserve.preserve_batch_size,
        seed=config.schedule.seed,
        max_tokens=tokens if config.schedule.packing else None,
        mask_target=config.preserve.preserve_mask_target,
    )


# ---- training and evaluation ----


def train(config: RunConfig, data: RunData, trainer: PrefixTrainer) -> None:
    """Trains, saves what was trained into the run's folder, and draws the loss; skips a finished run."""
    model = trainer.tuning.model
    if config.resume_from is None:
        _start_heads(config, data, trainer)
    if config.mixture is not None:
        for head in model.heads.values():
            head.mark_set()  # it may be scored before the first step of its task
    train_and_save(trainer, config.resume_from, len(data.train_rows(config.mixture is not None)))


def _start_heads(config: RunConfig, data: RunData, trainer: PrefixTrainer) -> None:
    """Gives every linear head that is still random its first values (--head_init)."""
    args, model = config.schedule, trainer.tuning.model
    for name, task in data.tasks.items():
        count = start_head(
            model.for_task(name) if config.mixture else model,
            task.train,
            PaddingCollator(task.head.tokenizer.pad_token_id, "right"),
            head_init=args.head_init,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        if args.should_save and count:
            print(f"{name}: the head starts from a logistic regression on {count} states (--head_init probe).")


def predict_test(config: RunConfig, data: RunData, trainer: PrefixTrainer) -> None:
    """Predicts the test rows, writes the files about them, and compares with the base if requested."""
    (task,) = data.tasks.values()
    tuning, labelled = trainer.tuning, has_gold(task.tested)
    predictions = predict_beside_base(
        tuning,
        tuning.described,
        task.head,
        task.tested,
        inference_settings(config),
        with_base=config.data.compare_base and tuning.method != "none" and labelled,
        under_engine=trainer.under_engine,
    )
    scores = {}
    if labelled:
        scores = {name: score_task(task.head.task, task.tested, own).metrics for name, own in predictions.items()}
    metrics: dict[str, Any] = {"predict_samples": len(task.tested)}
    for prefix, of_model in zip(("predict", "base"), reversed(scores.values()), strict=False):
        metrics |= {f"{prefix}_{name}": value for name, value in of_model.items()}
    if not config.schedule.should_save:
        return
    if not _is_of_registry(config):
        _write_answers(config, task, predictions)
    _write_report(config, task, list(predictions.values())[-1])
    # Last: a program that finds the scores expects the other files.
    keep(trainer, "predict", metrics)
    if scores:
        print_scores(scores)


def _write_answers(config: RunConfig, task: TaskData, predictions: Mapping[str, Sequence[Prediction]]) -> None:
    """Writes the answers as the official script does, and prints some; the last model is the tuned one."""
    texts = {name: [prediction.value for prediction in own] for name, own in predictions.items()}
    references = [example.reference for example in task.tested]
    answers = list(texts.values())[-1]
    rows = [{"labels": wanted, "predict": answer} for wanted, answer in zip(references, answers, strict=True)]
    write_lines(config.output / "generated_predictions.txt", rows)
    shown = slice(0, _SAMPLES_SHOWN)
    decode = task.head.tokenizer.decode
    prompts = [decode(example.prompt_ids, skip_special_tokens=True) for example in task.tested[shown]]
    print_samples(prompts, references[shown], {name: own[shown] for name, own in texts.items()})


def _write_report(config: RunConfig, task: TaskData, predictions: Sequence[Prediction]) -> None:
    """Writes report and submission into the run's folder `predict`."""
    test = config.tasks[0].test
    split = test.name if _is_of_registry(config) else ", ".join(test.places)
    settings = {
        **asdict(config.data),
        **asdict(inference_settings(config)),
        **asdict(config.base),
        "output_dir": str(config.output),
        "split": split,
        **head_settings(task.head),
    }
    folder = config.output / "predict"
    write_report(folder, task.head.task, task.tested, predictions, settings)
    if task.may_submit:
        trained_on = config.tasks[0].train
        variant = None if trained_on is None else submission_variant(task.head.task, trained_on.name)
        write_submission(task.head.task, task.tested, predictions, folder, split, variant)
    print(f"The predictions on {split} are in {folder}.")


def measure_drift(config: RunConfig, data: RunData, trainer: PrefixTrainer) -> None:
    """Measures how far the prefix has moved the model from its base on general rows."""
    metrics = drift_report(
        trainer.tuning.model,
        data.general.held_out,
        next(iter(data.tasks.values())).head.tokenizer,
        config.schedule.per_device_eval_batch_size,
        under_engine=trainer.under_engine,
    )
    if config.schedule.do_train:
        metrics["preserve_base"] = config.preserve.preserve_base
    keep(trainer, "general", metrics)


def inference_settings(config: RunConfig) -> InferenceSettings:
    """How predictions are made."""
    flags, args = config.data, config.schedule
    return InferenceSettings(
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=flags.val_max_target_length or flags.max_target_length,
        num_beams=flags.num_beams or args.generation_num_beams or 1,
    )
