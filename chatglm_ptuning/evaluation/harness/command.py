"""`chatglm-ptuning lm_eval`: C-Eval, CMMLU and other tasks through lm-evaluation-harness, with and without a prefix."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.data.tasks.task import Task
from chatglm_ptuning.evaluation.report import print_scores, write_report
from chatglm_ptuning.figures import draw_bars
from chatglm_ptuning.files import check_output_folder, write_text
from chatglm_ptuning.metrics.task_scores import TaskScores
from chatglm_ptuning.model.arguments import InferenceBaseArguments, is_plain_base
from chatglm_ptuning.prefix.latest import runs_folder
from chatglm_ptuning.version import kit_version

if TYPE_CHECKING:
    from chatglm_ptuning.evaluation.harness.model import ChatGLMHarnessModel
    from chatglm_ptuning.evaluation.harness.tasks import Exam, Selection

METRICS_FILE = "metrics.json"
RESULTS_FILE = "lm_eval_results.json"
"""lm-eval's own results."""


@dataclass
class HarnessArguments(InferenceBaseArguments):
    """Flags of the command."""

    ptuning_checkpoint: str | None = field(
        default=None, metadata={"help": "a prefix checkpoint of this kit, official or PEFT (default: the plain base)"}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "ceval, cmmlu, or any task of lm-eval by its name there (default: ceval)"}
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "solved examples in the prompt, from the dev split (default: the task's)"}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of the published CSV files of C-Eval and CMMLU, or modelscope (default: lm-eval "
            "loads them from the Hugging Face hub)"
        },
    )
    subjects: list[str] | None = field(
        default=None, metadata={"help": "only these subjects, categories or groups (Hard) of ceval and cmmlu"}
    )
    include_path: list[str] | None = field(
        default=None, metadata={"help": "folders with your own lm-eval task definitions (YAML)"}
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "use the base's chat format; solved examples become earlier turns"}
    )
    limit: int | None = field(default=None, metadata={"help": "maximum number of questions of each task"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "requests per batch"})
    compare_base: bool = field(default=False, metadata={"help": "also score the base without the prefix"})
    output_dir: str | None = field(
        default=None, metadata={"help": "folder for the reports (default: output/lm_eval/PREFIX or BASE)"}
    )

    def __post_init__(self) -> None:
        for name, least in (("num_fewshot", 0), ("limit", 1), ("per_device_eval_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.output_dir is not None:
            check_output_folder(self.output_dir)
        if is_plain_base(self.ptuning_checkpoint):
            self.ptuning_checkpoint = None
        if self.compare_base and self.ptuning_checkpoint is None:
            raise ValueError("--compare_base needs the prefix to compare with its base: give --ptuning_checkpoint")
        self.tasks = self.tasks or ["ceval"]


def run_harness(args: HarnessArguments) -> dict[str, Any]:
    """Evaluates, prints and writes; returns the content of `metrics.json`.

    In the output folder: `metrics.json`; `EXAM.png`, a bar for each subject and category; and for `prefix` and `base`
    a folder with lm-eval's own results and a report for each examination (`write_report`).

    Raises:
        ValueError, OSError, ImportError: if a file, a flag or the installation is wrong.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ImportError(f"lm-evaluation-harness is needed ({error}): pip install 'lm-eval[hf]==0.4.13'.") from error
    # Its warnings are about a loaded model, local data and few-shot examples, all of which are intended here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from chatglm_ptuning.evaluation.harness.model import ChatGLMHarnessModel
    from chatglm_ptuning.evaluation.harness.tasks import load_harness_tasks, select_tasks

    selection = select_tasks(args.tasks or (), args.subjects)

    def load_tasks() -> list[Any]:
        return load_harness_tasks(
            selection, data_dir=args.data_dir, num_fewshot=args.num_fewshot, include_path=args.include_path or ()
        )

    # Errors in files show before the base is loaded, which takes minutes.
    tasks = load_tasks()
    tokenizer, model = args.load_tokenizer(), args.load_model()
    names = ["base"]
    if args.ptuning_checkpoint is not None:
        model.load_prefix(args.find_prefix(args.ptuning_checkpoint))
        names = ["base", "prefix"] if args.compare_base else ["prefix"]
    chosen = Path(args.ptuning_checkpoint or args.model_name_or_path)
    output = Path(args.output_dir) if args.output_dir else runs_folder() / "lm_eval" / chosen.resolve().name
    output.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in names:
        prefix = None if name == "prefix" else model.prefix_batch(None)
        harness = ChatGLMHarnessModel(model, tokenizer, prefix=prefix, batch_size=args.per_device_eval_batch_size)
        # A task object keeps the answers of its run, so a second run needs new ones.
        results[name] = _evaluate(harness, tasks if name == names[0] else load_tasks(), args)
    return _report(args, selection, results, output)


def main(argv: Sequence[str]) -> None:
    """Entry of the command; user errors end it with a message and exit code 1."""
    (args,) = parse_arguments(
        "chatglm-ptuning lm_eval",
        "Score a prefix, or the plain base, on tasks of lm-evaluation-harness.",
        (HarnessArguments,),
        argv,
    )
    try:
        run_harness(args)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def _evaluate(harness: ChatGLMHarnessModel, tasks: list[Any], args: HarnessArguments) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        harness,
        tasks=tasks,
        num_fewshot=args.num_fewshot,
        batch_size=args.per_device_eval_batch_size,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        # The tasks are objects already; lm-eval's default manager would read thousands of definitions.
        task_manager=TaskManager(include_defaults=False),
    )
    return {**results, "cut_contexts": harness.cut_contexts}


def _report(
    args: HarnessArguments, selection: Selection, results: Mapping[str, dict[str, Any]], output: Path
) -> dict[str, Any]:
    content: dict[str, Any] = {"exams": {}, "other_tasks": {}}
    for name, result in results.items():
        (output / name).mkdir(exist_ok=True)
        own = {key: value for key, value in result.items() if key not in ("samples", "cut_contexts")}
        _write_json(output / name / RESULTS_FILE, own)
    for exam, _ in selection.exams.values():
        scores = {name: _write_exam_report(exam, result, output / name) for name, result in results.items()}
        columns = {name: {"accuracy": entry.metrics["accuracy"], **entry.groups} for name, entry in scores.items()}
        _draw_accuracies(output / f"{exam.task.name}.png", columns, exam.task)
        print_scores(columns, f"{exam.task.name}: accuracy (%)")
        content["exams"][exam.task.name] = {
            name: {"metrics": entry.metrics, "intervals": entry.intervals, "groups": entry.groups,
                   "questions": len(entry.of_examples)}
            for name, entry in scores.items()
        }  # fmt: skip
    of_exams = tuple(exam.prefix for exam, _ in selection.exams.values())
    for name, result in results.items():
        for task, values in result["results"].items():
            if not (of_exams and task.startswith(of_exams)):
                content["other_tasks"].setdefault(task, {})[name] = values
    for task, columns in content["other_tasks"].items():
        numbers = {
            name: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, float)}
            for name, values in columns.items()
        }
        print_scores(numbers, task)
    content["cut_contexts"] = {name: result["cut_contexts"] for name, result in results.items()}
    version = next(iter(results.values()))["lm_eval_version"]
    content["settings"] = {**asdict(args), "output_dir": str(output), "kit_version": kit_version(),
                           "lm_eval_version": version}  # fmt: skip
    _write_json(output / METRICS_FILE, content)
    if any(content["cut_contexts"].values()):
        print(f"Some contexts were too long and were truncated from the left: {content['cut_contexts']}.")
    print(f"{METRICS_FILE}, pictures and lm-eval's own results are in {output}.")
    return content


def _draw_accuracies(path: Path, columns: Mapping[str, Mapping[str, float]], task: Task) -> None:
    bars = {}
    for name in next(iter(columns.values())):
        title = f"{task.subjects[name].title} " if name in task.subjects else ""
        bars[title + name] = {model: (accuracies[name], None) for model, accuracies in columns.items()}
        bars[title + name]["chance"] = (25.0, None)
    draw_bars(path, bars, "accuracy (%)", title=task.title, dashed="chance")


def _write_exam_report(exam: Exam, result: Mapping[str, Any], folder: Path) -> TaskScores:
    import torch

    from chatglm_ptuning.evaluation.harness.tasks import scored_examples

    examples, scores = zip(*scored_examples(exam, result["samples"]), strict=True)
    probabilities, places = torch.tensor(scores).softmax(-1).max(-1)
    predictions = list(map(Prediction, places.tolist(), probabilities.tolist()))
    return write_report(folder / exam.task.name, exam.task, examples, predictions)


def _write_json(path: Path, content: Any) -> None:
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(content, ensure_ascii=False, indent=2, default=handle_non_serializable)
    write_text(path, text + "\n")
