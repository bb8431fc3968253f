"""What `evaluate` scores: a split of a task, or the rows of files; how it is read, and how its results are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chatglm_ptuning.data.dataset import Split
from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.tasks.arguments import TrainedReading, submission_variant, usual_split
from chatglm_ptuning.data.tasks.examples import ConversationExample, Example
from chatglm_ptuning.data.tasks.heads import LINEAR_HEADS, head_of, heads_of
from chatglm_ptuning.data.tasks.heads.head import Head, Prediction
from chatglm_ptuning.data.tasks.submission import can_submit, write_submission
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.arguments import EvaluationArguments
from chatglm_ptuning.evaluation.chosen_prefix import results_folder
from chatglm_ptuning.evaluation.parallel import print_once
from chatglm_ptuning.evaluation.recorded import TRAIN_SPLIT, recorded_details, recorded_head, recorded_reading
from chatglm_ptuning.evaluation.report import score_task, write_report
from chatglm_ptuning.files import write_json, write_lines
from chatglm_ptuning.model.loading import load_tokenizer

BASE_FOLDER = "base"
"""Folder, inside the one of the results, for those of the base without the prefix (--compare_base)."""

Predictions = Mapping[str, Sequence[Prediction]]
"""Of each model by its name, `base` or `prefix`; the one that the evaluation is about is the last."""
Scores = dict[str, dict[str, float]]
"""Of each model, by metric."""


@dataclass(frozen=True)
class TestSet:
    """Examples with the head that predicts them.

    Attributes:
        title: of the table of scores.
        output: folder of the results.
        write: scores predictions, and writes them with the settings by which they were made.
    """

    head: Head
    examples: Sequence[Example]
    title: str
    output: Path
    write: Callable[[Predictions, Mapping[str, Any]], Scores]


def read_task_split(args: EvaluationArguments, prefix: Path | None) -> TestSet:
    """The split that the flags name, and the head to predict it with.

    Args:
        prefix: None for the plain base.

    Raises:
        FileNotFoundError, ValueError: for what is wrong with a file or a flag, or does not fit the prefix.
    """
    task = args.chosen_task()
    split = args.split or usual_split(task, "test")
    output = Path(args.output_dir) if args.output_dir else results_folder(prefix) / f"{task.name}-{split}"
    found = args.loader().read(task, args.split_of(split, args.max_predict_samples))
    whole = args.max_predict_samples is None and args.subjects is None and not found.bad_rows.count
    may_submit = whole and can_submit(task, found.examples)
    name, trained, variant = _how_to_solve(args, task, prefix)
    tokenizer = load_tokenizer(args.model_name_or_path, hub=args.hub, revision=args.revision)
    head = args.make_head(task, tokenizer, args.max_source_length, args.max_target_length, name, trained)
    examples, _ = args.loader().make_ready(head, found)
    print_once(f"{task.name} ({task.title}), {split} in {args.task_data}, head {head.name}: {len(examples)} examples")
    write = partial(_write_split, task, examples, output, split, variant, may_submit)
    return TestSet(head, examples, f"{task.name}, {split} (%)", output, write)


def read_file_rows(args: EvaluationArguments, prefix: Path | None) -> TestSet:
    """The rows of the files that the flags name; each gives a prompt.

    Args:
        prefix: None for the plain base.

    Raises:
        ValueError, OSError: naming file and line of what is wrong.
    """
    output = Path(args.output_dir) if args.output_dir else results_folder(prefix)
    task = args.task_of(args.test_file)
    found = args.loader().read(task, Split(args.test_file, limit=args.max_predict_samples))
    tokenizer = load_tokenizer(args.model_name_or_path, hub=args.hub, revision=args.revision)
    head = args.conversation_head(task, tokenizer)
    examples, report = args.loader().make_ready(head, found)
    print_once(f"{', '.join(args.test_file)}\n{report.summary()}")
    return TestSet(head, examples, "Scores (%)", output, partial(_write_answers, head, examples, output, report))


def _how_to_solve(
    args: EvaluationArguments, task: Task, prefix: Path | None
) -> tuple[str, TrainedReading | None, str | None]:
    """The head, how it reads its texts, and the variant of the submission, as the prefix was trained for them.

    Raises:
        FileNotFoundError, ValueError: if the prefix is not there, or its head or the plain base cannot solve the task.
    """
    answering = [name for name in heads_of(task) if name not in LINEAR_HEADS]
    trained, variant = None, None
    if prefix is None:
        head = head_of(task, args.head or next(iter(answering), None)).name
    else:
        details = recorded_details(prefix, args.model_name_or_path, hub=args.hub, revision=args.revision)
        head = recorded_head(details, task, args.head, prefix)
        trained = recorded_reading(details, task, prefix)
        if details.get("task") == task.name:
            variant = submission_variant(task, details.get("training", {}).get(TRAIN_SPLIT))
    if head in LINEAR_HEADS and (prefix is None or args.compare_base):
        raise ValueError(
            f"The plain base has no {head.replace('_', ' ')} head for {task.name}; it can be scored by "
            f"{' or '.join(answering) or 'no head at all'}."
        )
    return head, trained, variant


def _write_split(
    task: Task,
    examples: Sequence[Example],
    output: Path,
    split: str,
    variant: str | None,
    may_submit: bool,
    predictions: Predictions,
    settings: Mapping[str, Any],
) -> Scores:
    """A report on each model, and its submission; what a prefix is compared with goes into `base`."""
    subject, scores = list(predictions)[-1], {}
    for name, own in predictions.items():
        folder = output if name == subject else output / BASE_FOLDER
        checkpoint = settings["ptuning_checkpoint"] if name == subject else None
        found = write_report(
            folder, task, examples, own, {**settings, "split": split, "ptuning_checkpoint": checkpoint}
        )
        if found is not None:
            scores[name] = found.metrics
        if may_submit:
            write_submission(task, examples, own, folder, split, variant if name == "prefix" else None)
    return scores


def _write_answers(
    head: Head,
    examples: Sequence[ConversationExample],
    output: Path,
    report: PreparationReport,
    predictions: Predictions,
    settings: Mapping[str, Any],
) -> Scores:
    """`metrics.json`, and `predictions.jsonl` with the answers of all models in a line."""
    scores = {name: score_task(head.task, examples, own).metrics for name, own in predictions.items()}
    subject, compared = list(predictions)[-1], len(predictions) > 1
    rows = []
    for place, example in enumerate(examples):
        prompt = head.tokenizer.decode(example.prompt_ids)
        row = {"input": prompt, "gold": example.reference, "prediction": predictions[subject][place].value}
        rows.append(row | ({"base_prediction": predictions["base"][place].value} if compared else {}))
    counts = report.as_dict()
    for unused in ("without_targets", "target_cut", "places"):
        counts.pop(unused)
    results = {"metrics": scores[subject]} | ({"base_metrics": scores["base"]} if compared else {})
    output.mkdir(parents=True, exist_ok=True)
    write_lines(output / "predictions.jsonl", rows)
    write_json(output / "metrics.json", {**results, "counts": counts, "settings": dict(settings)})
    return scores
