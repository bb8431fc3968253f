"""`chatglm-ptuning evaluate --task`: the predictions on a split of a task, their scores, and what went wrong."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.arguments import TrainedReading, submission_variant, usual_split
from chatglm_ptuning.data.tasks.encode import ANSWERING_HEADS, head_of
from chatglm_ptuning.data.tasks.readers import heads_of
from chatglm_ptuning.data.tasks.submission import can_submit
from chatglm_ptuning.evaluation.chosen_prefix import load_chosen, results_folder
from chatglm_ptuning.evaluation.parallel import is_first_process, print_once
from chatglm_ptuning.evaluation.table import print_scores
from chatglm_ptuning.evaluation.task_model import (
    TRAIN_SPLIT,
    model_settings,
    recorded_details,
    recorded_head,
    recorded_reading,
)
from chatglm_ptuning.evaluation.task_predictions import PredictionSettings, predict_together
from chatglm_ptuning.evaluation.task_report import write_results
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.version import kit_version

if TYPE_CHECKING:
    from chatglm_ptuning.data.tasks.task import Task
    from chatglm_ptuning.evaluation.run import EvaluationArguments

BASE_FOLDER = "base"
"""Folder, inside the one of the results, for those of the base without the prefix (--compare_base)."""


def evaluate_task(args: EvaluationArguments, prefix: Path | None) -> dict[str, Any]:
    """Predicts, scores, prints, and writes `write_results`' files into the folder.

    Args:
        prefix: None for the plain base.

    Returns:
        The scores of the subject, and of the base if it was to be compared: by `prefix` and `base`.

    Raises:
        ValueError, OSError, ImportError: for what is wrong with a file, a flag or the installation.
    """
    task = args.chosen_task()
    split = args.split or usual_split(task, "test")
    output = Path(args.output_dir) if args.output_dir else results_folder(prefix) / f"{task.name}-{split}"
    source = {"hub": args.hub, "revision": args.revision}
    # Rows first: what is wrong with a file shows before minutes go into loading the base.
    skipped = BadRows(args.skip_bad_rows)
    examples = args.examples(task, split, args.max_predict_samples, skipped)
    whole = args.max_predict_samples is None and args.subjects is None and not skipped.count
    may_submit = whole and can_submit(task, examples)
    head, trained, variant = _how_to_solve(args, task, prefix)
    tokenizer = load_tokenizer(args.model_name_or_path, **source)
    encoder = args.encoder(task, tokenizer, args.max_source_length, args.max_target_length, head, trained)
    print_once(f"{task.name} ({task.title}), {split} in {args.task_data}, head {head}: {len(examples)} examples")
    model = load_model(
        args.model_name_or_path,
        quantization_bit=args.quantization_bit,
        quantization_type=args.quantization_type,
        device_map=args.device_map,
        **source,
        **model_settings(task, head),
    )
    tuned = None if prefix is None else load_chosen(model, prefix, args.ptuning_checkpoint is not None, task.name)
    if tuned is not None and args.compare_base and not tuned.keeps_base:
        raise ValueError(f"--compare_base: {prefix} holds a whole tuned model, so score the base by itself.")
    subject = "base" if prefix is None else "prefix"
    settings = PredictionSettings(
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=args.max_target_length,
        num_beams=args.num_beams,
        candidate_scores=args.candidate_scores,
        max_answer_length=args.max_answer_length,
    )
    scores: dict[str, Any] = {}
    for name in ("base", "prefix") if args.compare_base and prefix is not None else (subject,):
        with nullcontext() if name == subject else tuned.plain_base() as used:
            predictions = predict_together(model, encoder, examples, settings, used)
        if not is_first_process():
            continue
        result = write_results(
            output if name == subject else output / BASE_FOLDER,
            task,
            examples,
            predictions,
            split,
            variant if name == "prefix" else None,
            may_submit=may_submit,
            settings={
                **asdict(args),
                "ptuning_checkpoint": None if name == "base" or prefix is None else str(prefix),
                "output_dir": str(output),
                "split": split,
                "head": head,
                "token_unit": encoder.token_unit,
                "echo": encoder.echo,
                "chat_format": tokenizer.chat_format,
                "kit_version": kit_version(),
            },
        )
        if result is not None:
            scores[name] = result.metrics
    if scores:
        print_scores(scores, f"{task.name}, {split} (%)")
    print_once(f"The results are in {output}.")
    return scores


def _how_to_solve(
    args: EvaluationArguments, task: Task, prefix: Path | None
) -> tuple[str, TrainedReading | None, str | None]:
    """The head, how it reads its texts, and the variant of the submission, as the prefix was trained for them.

    Raises:
        FileNotFoundError, ValueError: if the prefix is not there, or its head or the plain base cannot solve the task.
    """
    trained, variant = None, None
    if prefix is None:
        head = head_of(task, args.head or next((name for name in heads_of(task) if name in ANSWERING_HEADS), None))
    else:
        details = recorded_details(prefix, args.model_name_or_path, hub=args.hub, revision=args.revision)
        head = recorded_head(details, task, args.head, prefix)
        trained = recorded_reading(details, task, prefix)
        if details.get("task") == task.name:
            variant = submission_variant(task, details.get("training", {}).get(TRAIN_SPLIT))
    if head not in ANSWERING_HEADS and (prefix is None or args.compare_base):
        raise ValueError(
            f"The plain base has no {head.replace('_', ' ')} head for {task.name}; it can be scored by "
            f"{' or '.join(name for name in heads_of(task) if name in ANSWERING_HEADS) or 'no head at all'}."
        )
    return head, trained, variant
