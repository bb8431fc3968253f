"""`chatglm-ptuning evaluate`: from a test file to scores and predictions, with a prefix, without, or both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.conversation_encoder import ConversationEncoder
from chatglm_ptuning.data.conversations import read_conversations
from chatglm_ptuning.data.encoding import encode_all
from chatglm_ptuning.data.formats.registry import FORMATS, Columns
from chatglm_ptuning.data.report import PreparationReport
from chatglm_ptuning.data.sources.files import iterate_rows
from chatglm_ptuning.data.sources.rows import BadRows
from chatglm_ptuning.data.tasks.arguments import TaskArguments
from chatglm_ptuning.evaluation.chosen_prefix import PLAIN_BASE, choose_prefix, load_chosen, results_folder
from chatglm_ptuning.evaluation.parallel import (
    generate_answers_together,
    is_first_process,
    joined_processes,
    print_once,
)
from chatglm_ptuning.evaluation.table import print_scores
from chatglm_ptuning.evaluation.task_run import evaluate_task
from chatglm_ptuning.files import check_output_folder, write_atomically, write_json
from chatglm_ptuning.metrics.generation import score
from chatglm_ptuning.model.hub import DEFAULT_MODEL, InferenceBaseArguments
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.version import kit_version

DEFAULT_TEST_FILE = str(Path(DEFAULT_MODEL).parent / "news_topic" / "dev.json")
"""What is scored when no file is named: bundled with the sources, columns `content` and `summary`."""
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.jsonl"

RETIRED_FLAGS = {
    "do_predict": "generating and scoring is all that evaluate does.",
    "predict_with_generate": "answers are always generated.",
    "validation_file": "the rows of --test_file are scored.",
    "pre_seq_len": "the size is read from the prefix checkpoint.",
    "prefix_projection": "it is read from the prefix checkpoint.",
    "overwrite_cache": "rows to be scored are always prepared anew.",
    "overwrite_output_dir": "the results of an earlier evaluation are replaced, nothing else is touched.",
}
"""Flags of the official evaluate.sh that are accepted and have nothing left to do, with the reason."""


@dataclass
class EvaluationArguments(TaskArguments, InferenceBaseArguments):
    """Flags of the command; the official names with their meaning."""

    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={"help": "what was trained: a prefix (of this kit, official or PEFT) or a run by any --tuning; "
                  f"'{PLAIN_BASE}' for the plain base (default: the prefix trained last, if there is one)"},
    )  # fmt: skip
    test_file: list[str] | None = field(
        default=None, metadata={"help": "data files to score (default: the bundled headlines)"}
    )
    dataset_format: str | None = field(
        default=None, metadata={"help": f"{', '.join(FORMATS)} (default: detected from the field names)"}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "column of the source text (default: detected from the field names)"}
    )
    response_column: str | None = field(
        default=None, metadata={"help": "column of the answer (default: detected from the field names)"}
    )
    history_column: str | None = field(default=None, metadata={"help": "column of earlier turns"})
    source_prefix: str = field(default="", metadata={"help": "text in front of every source"})
    max_source_length: int = field(default=1024, metadata={"help": "tokens of the source at most"})
    max_target_length: int = field(default=128, metadata={"help": "tokens to generate at most"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "rows generated together"})
    num_beams: int = field(default=1, metadata={"help": "beams of generation (1: greedy)"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "score the first so many rows"})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": f"folder for {METRICS_FILE} and {PREDICTIONS_FILE} (default: output/evaluation/PREFIX; of a "
            "task output/evaluation/PREFIX/TASK-SPLIT)"
        },
    )
    compare_base: bool = field(default=False, metadata={"help": "score the base without the prefix too"})
    split: str | None = field(
        default=None, metadata={"help": "of the task, to predict (default: test, or dev where there is no test)"}
    )

    def __post_init__(self) -> None:
        InferenceBaseArguments.__post_init__(self)
        TaskArguments.__post_init__(self)
        if self.task is not None and self.test_file:
            raise ValueError("--task brings its own files: give --task_data and no --test_file")
        if self.task is None and self.echo is not None:
            raise ValueError("--echo belongs to a --task")
        if self.task is None and self.split:
            raise ValueError("--split belongs to a --task; name files by --test_file")
        for name in ("max_target_length", "per_device_eval_batch_size", "num_beams", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.output_dir is not None:
            check_output_folder(self.output_dir)
        if self.task is None:
            self.test_file = self.test_file or [DEFAULT_TEST_FILE]
        self.columns()

    def columns(self) -> Columns:
        """What the flags say about the rows.

        Raises:
            ValueError: if --dataset_format is unknown.
        """
        return Columns(self.prompt_column, self.response_column, self.history_column, self.dataset_format)


def evaluate(args: EvaluationArguments) -> dict[str, Any]:
    """Generates, scores, prints and writes; returns what `metrics.json` holds.

    Raises:
        ValueError, OSError, ImportError: for what is wrong with a file, a flag or the installation.
    """
    prefix = choose_prefix(args.ptuning_checkpoint)
    if args.task is not None:
        return evaluate_task(args, prefix)
    output = Path(args.output_dir) if args.output_dir else results_folder(prefix)
    # Rows first: what is wrong with a file shows before minutes go into loading the base.
    bad_rows = BadRows(args.skip_bad_rows)
    rows = iterate_rows(args.test_file, bad_rows)
    conversations = list(read_conversations(rows, args.columns(), bad_rows, args.max_predict_samples))
    source = {"hub": args.hub, "revision": args.revision}
    tokenizer = load_tokenizer(args.model_name_or_path, **source)
    encoder = ConversationEncoder(tokenizer, args.max_source_length, args.max_target_length, args.source_prefix)
    examples, report = encode_all(encoder.prompt, conversations, bad_rows)
    print_once(f"{', '.join(args.test_file)}\n{report.summary()}")
    output.mkdir(parents=True, exist_ok=True)
    model = load_model(
        args.model_name_or_path,
        quantization_bit=args.quantization_bit,
        quantization_type=args.quantization_type,
        device_map=args.device_map,
        **source,
    )
    tuned = None if prefix is None else load_chosen(model, prefix, chosen=args.ptuning_checkpoint is not None)
    if tuned is not None and args.compare_base and not tuned.keeps_base:
        raise ValueError(f"--compare_base: {prefix} holds a whole tuned model, so score the base by itself.")
    subject = "base" if prefix is None else "prefix"
    answers = {}
    for name in ("base", "prefix") if prefix is not None and args.compare_base else (subject,):
        with nullcontext() if name == subject else tuned.plain_base() as used:
            answers[name] = generate_answers_together(
                model,
                tokenizer,
                examples,
                batch_size=args.per_device_eval_batch_size,
                max_new_tokens=args.max_target_length,
                num_beams=args.num_beams,
                prefix=used,
            )
    references = [example["reference"] for example in examples]
    scores = {name: score(texts, references) for name, texts in answers.items()}
    results = {
        "metrics": scores[subject],
        **({"base_metrics": scores["base"]} if len(scores) > 1 else {}),
        "counts": _counts(report),
        "settings": {
            **asdict(args),
            "ptuning_checkpoint": None if prefix is None else str(prefix),
            "output_dir": str(output),
            "chat_format": tokenizer.chat_format,
            "decoding": "greedy" if args.num_beams == 1 else "beam search",
            "kit_version": kit_version(),
        },
    }
    if not is_first_process():
        return results
    prompts = [tokenizer.decode(example["input_ids"]) for example in examples]
    _write_predictions(output / PREDICTIONS_FILE, prompts, references, answers, subject)
    write_json(output / METRICS_FILE, results)
    print_scores(scores)
    print(f"{METRICS_FILE} and {PREDICTIONS_FILE} are in {output}.")
    return results


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


def _counts(report: PreparationReport) -> dict[str, Any]:
    """The report without the fields that only training fills."""
    unused = ("without_targets", "target_cut")
    return {name: value for name, value in report.as_dict().items() if name not in unused}


def _write_predictions(
    path: Path, prompts: list[str], references: list[str], answers: dict[str, list[str]], subject: str
) -> None:
    with write_atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for place, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            line = {"input": prompt, "gold": reference, "prediction": answers[subject][place]}
            if len(answers) > 1:
                line["base_prediction"] = answers["base"][place]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
