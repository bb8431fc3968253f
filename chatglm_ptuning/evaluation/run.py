"""`chatglm-ptuning evaluate`: from a test file to scores and predictions, with a prefix, without, or both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.conversation import Columns
from chatglm_ptuning.data.files import read_rows
from chatglm_ptuning.data.preprocess import PreparationReport, Preprocessor
from chatglm_ptuning.evaluation.generate import generate_answers
from chatglm_ptuning.evaluation.metrics import score
from chatglm_ptuning.evaluation.table import print_scores
from chatglm_ptuning.model.loading import (
    DEFAULT_MODEL,
    DEVICE_MAP_HELP,
    check_device_map,
    check_quantization,
    load_model,
    load_tokenizer,
)
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.prefix.bank import PrefixSelection
from chatglm_ptuning.prefix.checkpoint import kit_version
from chatglm_ptuning.prefix.files import write_atomically
from chatglm_ptuning.prefix.latest import find_latest_prefix, runs_folder

DEFAULT_TEST_FILE = str(Path(DEFAULT_MODEL).parent / "advertisement" / "dev.json")
"""What is scored when no file is named: bundled with the sources, columns `content` and `summary`."""
METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.jsonl"
PLAIN_BASE = "none"
"""As --ptuning_checkpoint: no prefix."""

RETIRED_FLAGS = {
    "do_predict": "generating and scoring is all that evaluate does.",
    "predict_with_generate": "answers are always generated.",
    "validation_file": "the rows of --test_file are scored.",
    "pre_seq_len": "the size is read from the prefix checkpoint.",
    "prefix_projection": "it is read from the prefix checkpoint.",
    "overwrite_cache": "nothing is cached on disk, rows are always prepared anew.",
    "overwrite_output_dir": "the results of an earlier evaluation are replaced, nothing else is touched.",
}
"""Flags of the official evaluate.sh that are accepted and have nothing left to do, with the reason."""


@dataclass
class EvaluationArguments:
    """Flags of the command; the official names with their meaning."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL, metadata={"help": "folder of the base, or its hub name (default: the bundled nano)"}
    )
    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={"help": f"the prefix, a folder of this kit, official or PEFT; '{PLAIN_BASE}' for the plain base "
                  "(default: the prefix trained last, if there is one)"},
    )  # fmt: skip
    test_file: str | None = field(
        default=None, metadata={"help": "JSON or JSON lines to score (default: the bundled advertisements)"}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "column of the source text (default: prompt)"})
    response_column: str | None = field(default=None, metadata={"help": "column of the answer (default: response)"})
    history_column: str | None = field(default=None, metadata={"help": "column of earlier turns"})
    source_prefix: str = field(default="", metadata={"help": "text in front of every source"})
    max_source_length: int = field(default=1024, metadata={"help": "tokens of the source at most"})
    max_target_length: int = field(default=128, metadata={"help": "tokens to generate at most"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "rows generated together"})
    num_beams: int = field(default=1, metadata={"help": "beams of generation (1: greedy)"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "score the first so many rows"})
    output_dir: str | None = field(
        default=None,
        metadata={"help": f"folder for {METRICS_FILE} and {PREDICTIONS_FILE} (default: output/evaluation/PREFIX)"},
    )
    quantization_bit: int | None = field(default=None, metadata={"help": "8 or 4: quantise the base (bitsandbytes)"})
    quantization_type: str = field(default="nf4", metadata={"help": "numbers of 4 bits: nf4 or fp4"})
    device_map: str | None = field(default=None, metadata={"help": DEVICE_MAP_HELP})
    compare_base: bool = field(default=False, metadata={"help": "score the base without the prefix too"})

    def __post_init__(self) -> None:
        for name in ("max_target_length", "per_device_eval_batch_size", "num_beams", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        check_quantization(self.quantization_bit, self.quantization_type)
        check_device_map(self.device_map)
        columns = ("content", "summary") if self.test_file is None else ("prompt", "response")
        self.test_file = self.test_file or DEFAULT_TEST_FILE
        self.prompt_column = self.prompt_column or columns[0]
        self.response_column = self.response_column or columns[1]


def evaluate(args: EvaluationArguments) -> dict[str, Any]:
    """Generates, scores, prints and writes; returns what `metrics.json` holds.

    Raises:
        ValueError, OSError, ImportError: for what is wrong with a file, a flag or the installation.
    """
    prefix = _choose_prefix(args.ptuning_checkpoint)
    # Rows first: what is wrong with a file shows before minutes go into loading the base.
    rows = read_rows(args.test_file)[: args.max_predict_samples]
    tokenizer = load_tokenizer(args.model_name_or_path)
    columns = Columns(args.prompt_column, args.response_column, args.history_column)
    preprocessor = Preprocessor(
        tokenizer, columns, args.max_source_length, args.max_target_length, source_prefix=args.source_prefix
    )
    examples, report = preprocessor.for_generation(rows)
    print(f"{args.test_file}\n{report.summary()}")
    output = Path(args.output_dir) if args.output_dir else runs_folder() / "evaluation" / _short_name(prefix)
    output.mkdir(parents=True, exist_ok=True)
    model = load_model(
        args.model_name_or_path,
        quantization_bit=args.quantization_bit,
        quantization_type=args.quantization_type,
        device_map=args.device_map,
    )
    selected = None if prefix is None else _load_prefix(model, prefix, chosen=args.ptuning_checkpoint is not None)
    subject = "base" if prefix is None else "prefix"
    answers = {}
    for name in ("base", "prefix") if prefix is not None and args.compare_base else (subject,):
        model.set_prefix(selected if name == "prefix" else None)
        answers[name] = generate_answers(
            model,
            tokenizer,
            examples,
            batch_size=args.per_device_eval_batch_size,
            max_new_tokens=args.max_target_length,
            num_beams=args.num_beams,
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
    prompts = [tokenizer.decode(example["input_ids"]) for example in examples]
    _write_predictions(output / PREDICTIONS_FILE, prompts, references, answers, subject)
    with write_atomically(output / METRICS_FILE) as temporary:
        temporary.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print_scores(scores)
    print(f"{METRICS_FILE} and {PREDICTIONS_FILE} are in {output}.")
    return results


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors that users can mend end it with a message and exit code 1."""
    (args,) = parse_arguments(
        "chatglm-ptuning evaluate",
        "Generate answers to the rows of a file and score them.",
        (EvaluationArguments,),
        argv,
        RETIRED_FLAGS,
    )
    try:
        evaluate(args)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def _choose_prefix(named: str | None) -> Path | None:
    """The prefix to score, None for the plain base; says which it is."""
    if named is not None and named.lower() == PLAIN_BASE:
        print("Scoring the plain base, without a prefix.")
        return None
    if named is not None:
        print(f"Scoring the prefix in {named}.")
        return Path(named)
    newest = find_latest_prefix(runs_folder())
    if newest is None:
        print(f"Scoring the plain base: there is no trained prefix in {runs_folder()} (see --ptuning_checkpoint).")
    else:
        print(f"Scoring the prefix that was trained last, in {newest} (see --ptuning_checkpoint).")
    return newest


def _short_name(prefix: Path | None) -> str:
    if prefix is None:
        return "base"
    folder = (prefix.parent if prefix.is_file() else prefix).resolve()
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def _load_prefix(model: ChatGLMForConditionalGeneration, prefix: Path, chosen: bool) -> PrefixSelection:
    """Loads the prefix and returns the name to select it by."""
    try:
        model.load_prefix(prefix)
    except ValueError as error:
        if chosen:
            raise
        raise ValueError(
            f"{error}\nIt was taken for being the one trained last. Name another by --ptuning_checkpoint, its base by "
            f"--model_name_or_path, or score the plain base by --ptuning_checkpoint {PLAIN_BASE}."
        ) from error
    return model.selected_prefix


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
