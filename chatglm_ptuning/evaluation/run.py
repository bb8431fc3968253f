"""`chatglm-ptuning evaluate`: from a split or files to scores and predictions, with a prefix, without, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.cache import TokenCache
from chatglm_ptuning.data.dataset import Loader
from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.tasks.examples import ConversationExample, Example
from chatglm_ptuning.data.tasks.heads.head import Head, Prediction
from chatglm_ptuning.data.tasks.submission import can_submit, write_submission
from chatglm_ptuning.evaluation.arguments import RETIRED_FLAGS, EvaluationArguments
from chatglm_ptuning.evaluation.chosen_prefix import load_chosen
from chatglm_ptuning.evaluation.config import EvaluationConfig, resolve
from chatglm_ptuning.evaluation.inference import InferenceSettings, predict_beside_base
from chatglm_ptuning.evaluation.parallel import is_first_process, joined_processes, print_once
from chatglm_ptuning.evaluation.report import head_settings, print_scores, score_task, write_report
from chatglm_ptuning.files import write_json, write_lines
from chatglm_ptuning.tuning.tuning import NoTuning, Tuning

BASE_FOLDER = "base"
"""Folder, inside the one of the results, for those of the base without the prefix (--compare_base)."""

Predictions = Mapping[str, Sequence[Prediction]]
"""Of each model by its name, `base` or `prefix`; the one that the evaluation is about is the last."""
Scores = dict[str, dict[str, float]]
"""Of each model, by metric."""


def main(argv: Sequence[str]) -> None:
    """Entry of the command; user errors end it with a message and exit code 1."""
    (args,) = parse_arguments(
        "chatglm-ptuning evaluate",
        "Predict a split of a task, or generate answers to the rows of a file, and score that.",
        (EvaluationArguments,),
        argv,
        RETIRED_FLAGS,
    )
    try:
        with joined_processes():
            evaluate(args)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def evaluate(args: EvaluationArguments) -> Scores:
    """Reads, loads, predicts, scores, writes and prints; returns the scores, in the first process alone.

    Raises:
        ValueError, OSError, ImportError: if a file, a flag or the installation is faulty.
    """
    config = resolve(args)
    setup, prefix = config.setup, config.prefix
    # Rows first: an error in a file shows before minutes go into loading the base.
    loader = Loader(TokenCache(), args.skip_bad_rows)
    found = loader.read(setup.task, config.split)
    whole = config.split.limit is None and args.subjects is None and not found.bad_rows.count
    may_submit = whole and can_submit(setup.task, found.examples)
    head = setup.make_head(args.load_tokenizer())
    examples, report = loader.make_ready(head, found)
    print_once(_described(config, report))
    model = args.load_model(**head.model_settings(head.task))
    tuned: Tuning = NoTuning(model)
    if prefix is not None:
        tuned = load_chosen(model, prefix, args.ptuning_checkpoint is not None, args.task and setup.task.name)
    predictions = predict_beside_base(
        tuned,
        "base" if prefix is None else "prefix",
        head,
        examples,
        InferenceSettings(args.per_device_eval_batch_size, args.max_target_length, args.num_beams),
        with_base=config.compares,
    )
    if not is_first_process():
        return {}
    settings = {
        **asdict(args),
        "ptuning_checkpoint": None if prefix is None else str(prefix),
        "output_dir": str(config.output),
        "decoding": "greedy" if args.num_beams == 1 else "beam search",
        **head_settings(head),
    }
    if args.task is None:
        scores = _write_answers(config, head, examples, predictions, report, settings)
    else:
        scores = _write_reports(config, head, examples, predictions, settings, may_submit)
    if scores:
        title = "Scores (%)" if args.task is None else f"{setup.task.name}, {config.split.name} (%)"
        print_scores(scores, title)
    print(f"The results are in {config.output}.")
    return scores


def _described(config: EvaluationConfig, report: PreparationReport) -> str:
    task, places = config.setup.task, ", ".join(config.split.places)
    if config.args.task is None:
        return f"{places}\n{report.summary()}"
    head = config.setup.head.name
    return f"{task.name} ({task.title}), {config.split.name} in {places}, head {head}: {report.examples} examples"


def _write_reports(
    config: EvaluationConfig,
    head: Head,
    examples: Sequence[Example],
    predictions: Predictions,
    settings: Mapping[str, Any],
    may_submit: bool,
) -> Scores:
    """A report on each model, and its submission; those of the compared base go into `base`."""
    subject, scores, split = list(predictions)[-1], {}, config.split.name
    for name, own in predictions.items():
        folder = config.output if name == subject else config.output / BASE_FOLDER
        checkpoint = settings["ptuning_checkpoint"] if name == subject else None
        found = write_report(
            folder, head.task, examples, own, {**settings, "split": split, "ptuning_checkpoint": checkpoint}
        )
        if found is not None:
            scores[name] = found.metrics
        if may_submit:
            variant = config.variant if name == "prefix" else None
            write_submission(head.task, examples, own, folder, split, variant)
    return scores


def _write_answers(
    config: EvaluationConfig,
    head: Head,
    examples: Sequence[ConversationExample],
    predictions: Predictions,
    report: PreparationReport,
    settings: Mapping[str, Any],
) -> Scores:
    """`metrics.json`, and `predictions.jsonl` with the answers of all models in a line."""
    scores = {name: score_task(head.task, examples, own).metrics for name, own in predictions.items()}
    subject = list(predictions)[-1]
    rows = []
    for place, example in enumerate(examples):
        prompt = head.tokenizer.decode(example.prompt_ids)
        row = {"input": prompt, "gold": example.reference, "prediction": predictions[subject][place].value}
        rows.append(row | ({"base_prediction": predictions["base"][place].value} if config.compares else {}))
    counts = report.as_dict()
    for unused in ("without_targets", "target_cut", "places"):
        counts.pop(unused)
    results = {"metrics": scores[subject]} | ({"base_metrics": scores["base"]} if config.compares else {})
    config.output.mkdir(parents=True, exist_ok=True)
    write_lines(config.output / "predictions.jsonl", rows)
    write_json(config.output / "metrics.json", {**results, "counts": counts, "settings": dict(settings)})
    return scores
