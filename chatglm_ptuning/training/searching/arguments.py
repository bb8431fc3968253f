"""Flags of `chatglm-ptuning search`: what is tried, and all flags of `train` for what stays the same."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from chatglm_ptuning.files import check_output_folder
from chatglm_ptuning.prefix.latest import runs_folder
from chatglm_ptuning.training.arguments import DataArguments, ModelArguments, PrefixTrainingArguments
from chatglm_ptuning.training.initialisation import PREFIX_INITS
from chatglm_ptuning.training.preservation import PreservationArguments

if TYPE_CHECKING:
    import optuna

TRAIN_ARGUMENTS = (ModelArguments, DataArguments, PrefixTrainingArguments, PreservationArguments)
PROJECTIONS = {"false": (False,), "true": (True,), "both": (False, True)}
LEARNING_RATE_SCALES = ("values", "log", "linear")
PRUNERS = ("halving", "none")
_RULED_BY_SEARCH = {
    "seed", "do_train", "do_eval", "do_predict", "predict_split", "max_predict_samples", "compare_base",
    "eval_strategy", "save_strategy", "load_best_model_at_end", "overwrite_output_dir", "resume_from_checkpoint",
    "ptuning_checkpoint", "train_file", "train_weights", "validation_file", "test_file", "predict_with_generate",
    "disable_tqdm", "report_to",
}  # fmt: skip
"""Flags of `train` that `search` sets itself, or that make no sense in it."""


@dataclass(frozen=True)
class Setting:
    """What one trial tries; the names are those of the flags of `train`."""

    pre_seq_len: int
    learning_rate: float
    prefix_projection: bool
    prefix_init: str

    def flags(self, init_prefix_text: str | None) -> list[str]:
        """As flags of `train`."""
        start = ["--init_prefix_text", init_prefix_text] if self.prefix_init == "text" and init_prefix_text else []
        return [
            "--pre_seq_len", str(self.pre_seq_len), "--learning_rate", repr(self.learning_rate),
            "--prefix_projection", str(self.prefix_projection).lower(), *(start or ["--prefix_init", self.prefix_init]),
        ]  # fmt: skip


@dataclass
class SearchArguments:
    """What is tried, how each trial is judged, and where the study is kept."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "folder of study and report (default: output/search); another process with the same command "
                  "helps, and the command given again goes on"},
    )  # fmt: skip
    pre_seq_len: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64, 128], metadata={"help": "numbers of virtual tokens to try"}
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [3e-3, 1e-2, 3e-2],
        metadata={"help": "learning rates to try; or with --learning_rate_scale log or linear the two ends of a range"},
    )
    learning_rate_scale: str = field(
        default="values", metadata={"help": "values (a list), or log or linear (draw from a range; needs --trials)"}
    )
    prefix_projection: str = field(default="false", metadata={"help": "true, false or both"})
    prefix_init: list[str] = field(
        default_factory=lambda: ["data"], metadata={"help": f"first values to try: {', '.join(PREFIX_INITS)}"}
    )
    init_prefix_text: str | None = field(
        default=None, metadata={"help": "the text that --prefix_init text starts from"}
    )
    seeds: list[int] = field(
        default_factory=lambda: [42],
        metadata={"help": "seeds that every setting is trained with; its value is the mean"},
    )
    trials: int | None = field(
        default=None,
        metadata={"help": "so many settings, chosen by TPE, in all (default: every combination of the lists, once)"},
    )
    search_seed: int = field(default=0, metadata={"help": "of the choice of settings under --trials"})
    metric: str | None = field(default=None, metadata={"help": "to go by, or loss (default: the task's own)"})
    max_steps: int = field(default=200, metadata={"help": "training steps of a trial"})
    eval_steps: int | None = field(
        default=None, metadata={"help": "steps between evaluations on the dev split (default: a quarter of max_steps)"}
    )
    pruner: str = field(
        default="halving",
        metadata={"help": "halving: successive halving over the evaluations of a setting's first seed; or none"},
    )
    min_resource: int | None = field(
        default=None, metadata={"help": "steps before the first halving (default: eval_steps)"}
    )
    reduction_factor: int = field(default=2, metadata={"help": "one in so many goes on at each halving"})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = str(runs_folder() / "search")
        check_output_folder(self.output_dir)
        self._check_lists()
        self._check_choice("prefix_projection", tuple(PROJECTIONS))
        self._check_choice("learning_rate_scale", LEARNING_RATE_SCALES)
        self._check_choice("pruner", PRUNERS)
        for name in self.prefix_init:
            if name not in PREFIX_INITS:
                raise ValueError(f"--prefix_init must be among {', '.join(PREFIX_INITS)}, got {name!r}")
        if ("text" in self.prefix_init) != bool(self.init_prefix_text):
            raise ValueError("--prefix_init text and --init_prefix_text TEXT belong together: give both")
        if self.eval_steps is None:
            self.eval_steps = max(1, self.max_steps // 4)
        if self.min_resource is None:
            self.min_resource = self.eval_steps
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
                raise ValueError("a range of learning rates needs --trials: how many settings to try")

    def _check_lists(self) -> None:
        for name in ("pre_seq_len", "learning_rate", "prefix_init", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"--{name} needs at least one value")
            setattr(self, name, list(dict.fromkeys(values)))
        for name in ("pre_seq_len", "learning_rate"):
            wrong = [value for value in getattr(self, name) if not value > 0]
            if wrong:
                raise ValueError(f"--{name} must be above 0, got {wrong[0]}")

    def _check_choice(self, name: str, known: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def is_grid(self) -> bool:
        """Whether every combination is tried, not a number of chosen ones."""
        return self.trials is None

    def grid(self) -> list[Setting]:
        """Every combination of the lists."""
        lists = (self.prefix_init, PROJECTIONS[self.prefix_projection], self.pre_seq_len, self.learning_rate)
        return [
            Setting(length, rate, projection, start) for start, projection, length, rate in itertools.product(*lists)
        ]

    def suggest(self, trial: optuna.Trial) -> Setting:
        """The setting of a trial, chosen by its study's sampler."""
        low, high = min(self.learning_rate), max(self.learning_rate)
        rate = (
            trial.suggest_categorical("learning_rate", self.learning_rate)
            if self.learning_rate_scale == "values"
            else trial.suggest_float("learning_rate", low, high, log=self.learning_rate_scale == "log")
        )
        return Setting(
            trial.suggest_categorical("pre_seq_len", self.pre_seq_len),
            rate,
            trial.suggest_categorical("prefix_projection", PROJECTIONS[self.prefix_projection]),
            trial.suggest_categorical("prefix_init", self.prefix_init),
        )


def passed_arguments() -> tuple[type, ...]:
    """The dataclasses of `train` without what `search` has itself, and without their checks."""
    taken = {part.name for part in dataclasses.fields(SearchArguments)} | _RULED_BY_SEARCH
    return tuple(_without(dataclass_type, taken) for dataclass_type in TRAIN_ARGUMENTS)


def _without(dataclass_type: type, taken: Iterable[str]) -> type:
    hints = get_type_hints(dataclass_type)
    kept = []
    for part in dataclasses.fields(dataclass_type):
        if part.init and part.name not in taken:
            default = (
                {"default_factory": part.default_factory}
                if part.default_factory is not MISSING
                else {"default": part.default}
            )
            kept.append((part.name, hints[part.name], field(**default, metadata=part.metadata)))
    return make_dataclass(dataclass_type.__name__, kept)


def flags_of(values: Sequence[Any], defaults: Sequence[Any]) -> list[str]:
    """The flags that give dataclasses of `passed_arguments` their values.

    Args:
        defaults: the same dataclasses as they are parsed from no flags; what is equal to them needs no flag.
    """
    flags = []
    for holder, usual in zip(values, defaults, strict=True):
        for part in dataclasses.fields(holder):
            value = getattr(holder, part.name)
            if value != getattr(usual, part.name) and value is not None:
                words = value if isinstance(value, list) else [value]
                flags += [f"--{part.name}", *map(_word, words)]
    return flags


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return str(value.value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
