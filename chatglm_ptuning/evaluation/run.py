"""`chatglm-ptuning evaluate`: from a split or files to scores and predictions, with a prefix, without, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.evaluation.arguments import RETIRED_FLAGS, EvaluationArguments
from chatglm_ptuning.evaluation.chosen_prefix import choose_prefix, load_chosen
from chatglm_ptuning.evaluation.inference import InferenceSettings, predict_beside_base
from chatglm_ptuning.evaluation.parallel import is_first_process, joined_processes
from chatglm_ptuning.evaluation.report import head_settings, print_scores
from chatglm_ptuning.evaluation.test_sets import Scores, read_file_rows, read_task_split
from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.tuning.tuning import NoTuning, Tuning


def evaluate(args: EvaluationArguments) -> Scores:
    """Reads, loads, predicts, scores, writes and prints; returns the scores, in the first process alone.

    Raises:
        ValueError, OSError, ImportError: for what is wrong with a file, a flag or the installation.
    """
    prefix = choose_prefix(args.ptuning_checkpoint)
    # Rows first: what is wrong with a file shows before minutes go into loading the base.
    tests = read_file_rows(args, prefix) if args.task is None else read_task_split(args, prefix)
    model = load_model(
        args.model_name_or_path,
        hub=args.hub,
        revision=args.revision,
        quantization_bit=args.quantization_bit,
        quantization_type=args.quantization_type,
        device_map=args.device_map,
        **tests.head.model_settings(tests.head.task),
    )
    tuned: Tuning = NoTuning(model)
    if prefix is not None:
        tuned = load_chosen(model, prefix, args.ptuning_checkpoint is not None, args.task and tests.head.task.name)
    if args.compare_base and not tuned.keeps_base:
        raise ValueError(f"--compare_base: {prefix} holds a whole tuned model, so score the base by itself.")
    predictions = predict_beside_base(
        tuned,
        "base" if prefix is None else "prefix",
        tests.head,
        tests.examples,
        InferenceSettings(args.per_device_eval_batch_size, args.max_target_length, args.num_beams),
        with_base=args.compare_base and prefix is not None,
    )
    if not is_first_process():
        return {}
    scores = tests.write(
        predictions,
        {
            **asdict(args),
            "ptuning_checkpoint": None if prefix is None else str(prefix),
            "output_dir": str(tests.output),
            "decoding": "greedy" if args.num_beams == 1 else "beam search",
            **head_settings(tests.head),
        },
    )
    if scores:
        print_scores(scores, tests.title)
    print(f"The results are in {tests.output}.")
    return scores


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors that users can mend end it with a message and exit code 1."""
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
