"""Flags of `chatglm-ptuning evaluate`, with the names of the official scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from chatglm_ptuning.data.tasks.arguments import TaskArguments
from chatglm_ptuning.files import check_output_folder
from chatglm_ptuning.model.arguments import DEFAULT_MODEL, PLAIN_BASE, InferenceBaseArguments

DEFAULT_TEST_FILE = str(Path(DEFAULT_MODEL).parent / "news_topic" / "dev.json")
"""Files to score when none are named: bundled with the sources, columns `text` and `label`."""

RETIRED_FLAGS = {
    "do_predict": "generating and scoring is all that evaluate does.",
    "predict_with_generate": "answers are always generated.",
    "validation_file": "the rows of --test_file are scored.",
    "pre_seq_len": "the size is read from the prefix checkpoint.",
    "prefix_projection": "it is read from the prefix checkpoint.",
    "overwrite_cache": "rows to be scored are never cached.",
    "overwrite_output_dir": "the results of an earlier evaluation are replaced, nothing else is touched.",
}
"""Flags of the official evaluate.sh that are accepted without effect, with the reason."""


@dataclass
class EvaluationArguments(TaskArguments, InferenceBaseArguments):
    """Flags of the command."""

    ptuning_checkpoint: str | None = field(
        default=None,
        metadata={"help": "what was trained: a prefix (of this kit, official or PEFT) or a run by any --tuning; "
                  f"'{PLAIN_BASE}' for the plain base (default: the prefix trained last, if there is one)"},
    )  # fmt: skip
    test_file: list[str] | None = field(
        default=None, metadata={"help": "data files to score (default: the bundled headlines)"}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "number of rows that are computed at a time"})
    num_beams: int = field(default=1, metadata={"help": "beams of generation (1: greedy)"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "maximum number of rows to score"})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder for metrics.json and predictions.jsonl (default: output/evaluation/PREFIX; for "
            "a task output/evaluation/PREFIX/TASK-SPLIT)"
        },
    )
    compare_base: bool = field(default=False, metadata={"help": "score the base without the prefix too"})
    split: str | None = field(
        default=None, metadata={"help": "split of the task to predict (default: test, or dev if there is no test)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
