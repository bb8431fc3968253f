"""Flags of `chatglm-ptuning search`: the values to try, and the flags of `train` that all trials share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from chatglm_ptuning.command_line import flag_words
from chatglm_ptuning.files import check_output_folder
from chatglm_ptuning.prefix.latest import runs_folder
from chatglm_ptuning.training.initialisation import PREFIX_INITS
from chatglm_ptuning.training.run import TRAIN_FLAGS

PROJECTIONS = {"false": (False,), "true": (True,), "both": (False, True)}
_SET_BY_SEARCH = {
    "seed", "do_train", "do_eval", "do_predict", "predict_split", "max_predict_samples", "compare_base",
    "eval_strategy", "save_strategy", "load_best_model_at_end", "overwrite_output_dir", "resume_from_checkpoint",
    "ptuning_checkpoint", "test_file", "predict_with_generate", "disable_tqdm", "report_to",
}  # fmt: skip
"""Flags of `train` that `search` sets itself, or that do not apply to it."""


Setting = dict[str, Any]
"""The flags of `train` that a trial sets: `pre_seq_len`, `learning_rate`, `prefix_projection` and `prefix_init`."""


@dataclass
class SearchArguments:
    """The values to try, how trials are scored and pruned, and the output folder."""

    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder of the runs and the report (default: output/search); the same command resumes the "
            "search, and several processes of it share the trials"
        },
    )
    pre_seq_len: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64, 128], metadata={"help": "numbers of virtual tokens to try"}
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [3e-3, 1e-2, 3e-2],
        metadata={"help": "learning rates to try, or with --learning_rate_scale log or linear the ends of a range"},
    )
    learning_rate_scale: Literal["values", "log", "linear"] = field(
        default="values", metadata={"help": "values: a list; log or linear: sample from a range (needs --trials)"}
    )
    prefix_projection: Literal["false", "true", "both"] = field(
        default="false", metadata={"help": "whether the prefix has a projection (two-layer MLP): true, false or both"}
    )
    prefix_init: list[str] = field(
        default_factory=lambda: ["data"], metadata={"help": f"initial values to try: {', '.join(PREFIX_INITS)}"}
    )
    init_prefix_text: str | None = field(
        default=None, metadata={"help": "the text that --prefix_init text starts from"}
    )
    seeds: list[int] = field(
        default_factory=lambda: [42], metadata={"help": "seeds of every trial; its score is the mean"}
    )
    trials: int | None = field(
        default=None,
        metadata={"help": "number of trials, proposed by Optuna's TPE (default: every combination of the lists)"},
    )
    search_seed: int = field(default=0, metadata={"help": "seed of TPE"})
    metric: str | None = field(default=None, metadata={"help": "metric to optimise, or loss (default: the task's)"})
    max_steps: int = field(default=200, metadata={"help": "training steps of a trial"})
    eval_steps: int | None = field(
        default=None, metadata={"help": "steps between evaluations on the dev split (default: a quarter of max_steps)"}
    )
    pruner: Literal["halving", "none"] = field(
        default="halving",
        metadata={"help": "halving: successive halving by the evaluations of a trial's first seed; or none"},
    )
    min_resource: int | None = field(
        default=None, metadata={"help": "training steps before the first halving (default: eval_steps)"}
    )
    reduction_factor: int = field(default=2, metadata={"help": "each halving keeps one trial of this many"})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = str(runs_folder() / "search")
        check_output_folder(self.output_dir)
        for name in ("pre_seq_len", "learning_rate", "prefix_init", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"--{name} needs at least one value")
            setattr(self, name, list(dict.fromkeys(values)))
        for name in ("pre_seq_len", "learning_rate"):
            if wrong := [value for value in getattr(self, name) if not value > 0]:
                raise ValueError(f"--{name} must be above 0, got {wrong[0]}")
        for name in self.prefix_init:
            if name not in PREFIX_INITS:
                raise ValueError(f"--prefix_init must be among {', '.join(PREFIX_INITS)}, got {name!r}")
        if ("text" in self.prefix_init) != bool(self.init_prefix_text):
            raise ValueError("--prefix_init text and --init_prefix_text TEXT belong together: give both")
        self.eval_steps = max(1, self.max_steps // 4) if self.eval_steps is None else self.eval_steps
        self.min_resource = self.eval_steps if self.min_resource is None else self.min_resource
        for name, least in (("max_steps", 1), ("eval_steps", 1), ("min_resource", 1), ("reduction_factor", 2),
                            ("trials", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.eval_steps > self.max_steps:
            raise ValueError(f"--eval_steps {self.eval_steps} is more than --max_steps {self.max_steps}")
        if self.learning_rate_scale != "values":
            if len(self.learning_rate) != 2 or self.learning_rate[0] >= self.learning_rate[1]:
                raise ValueError(f"--learning_rate_scale {self.learning_rate_scale} needs --learning_rate LOW HIGH")
            if self.trials is None:
                raise ValueError("a range of learning rates needs --trials, the number of trials")

    @property
    def is_grid(self) -> bool:
        """Whether every combination of the lists is tried, not a number of sampled ones."""
        return self.trials is None

    def grid(self) -> list[Setting]:
        """Every combination of the lists."""
        lists = (self.prefix_init, PROJECTIONS[self.prefix_projection], self.pre_seq_len, self.learning_rate)
        return [
            {"pre_seq_len": length, "learning_rate": rate, "prefix_projection": projection, "prefix_init": start}
            for start, projection, length, rate in itertools.product(*lists)
        ]

    def train_arguments(self, common: Sequence[str], setting: Setting, seed: int) -> list[str]:
        """The arguments of `train` for a setting, without --output_dir.

        Args:
            common: flags that all trials share.
        """
        text = {"init_prefix_text": self.init_prefix_text} if setting["prefix_init"] == "text" else {}
        steps = {"max_steps": self.max_steps, "eval_strategy": "steps", "eval_steps": self.eval_steps}
        flags = {"do_train": True, "do_eval": True, **setting, **text, **steps, "seed": seed}
        return [*common, *flag_words(flags)]


def passed_flags() -> type:
    """A dataclass of the flags of `train` that `search` passes on, without their checks."""
    taken = {part.name for part in fields(SearchArguments)} | _SET_BY_SEARCH
    passed = []
    for kind in TRAIN_FLAGS:
        hints = get_type_hints(kind)
        passed += [
            (part.name, hints[part.name], copy.copy(part))
            for part in fields(kind)
            if part.init and part.name not in taken
        ]
    return make_dataclass("PassedFlags", passed)


def words_of(flags: Any, defaults: Any) -> list[str]:
    """The words on a command line for an instance of `passed_flags`, without the values of `defaults`."""
    given = {part.name: getattr(flags, part.name) for part in fields(flags)}
    return flag_words({name: value for name, value in given.items() if value != getattr(defaults, name)})
