"""Parsing of every command's flags: from the command line, and from a YAML or JSON file."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import sys
from argparse import Action
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

logger = logging.get_logger(__name__)

_RENAMED = {
    "warmup_ratio": "--warmup_steps, where a value below 1 is a share of all steps",
    "evaluation_strategy": "--eval_strategy",
    "no_cuda": "--use_cpu",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "adafactor": "--optim adafactor",
}
"""Flag of earlier versions of transformers -> what does the same now."""


class _RaisingParser(HfArgumentParser):
    """As transformers', but it raises ValueError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            flag = action.option_strings[0] if action.option_strings else action.dest
            self.error(f"{flag} must be one of {', '.join(map(str, action.choices))}, got {value!r}")


class _Parser(_RaisingParser):
    """As transformers', but errors are not buried under two hundred flags of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nAll flags: {self.prog} --help\n")


def parse_arguments(
    program: str,
    description: str,
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    retired: Mapping[str, str] | None = None,
    positional: str | None = None,
) -> tuple[Any, ...]:
    """Parses flags into dataclasses; an invalid flag ends the process with exit code 2.

    `--config FILE` reads flags from a YAML or JSON mapping; flags on the command line override it.

    Args:
        program: the command as the user types it.
        dataclass_types: one instance of each is returned, in this order. A field's help text is in its metadata.
        argv: without the program's name.
        retired: flags that are accepted and ignored, with the reason that is printed as a warning.
        positional: name of the one or more values without a flag; the first dataclass gets them as this attribute.

    Raises:
        SystemExit: on an unknown flag (the message names the nearest known one) or a bad value.
    """
    parser = _Parser(list(dataclass_types), prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with flags; the command line overrides it")
    if positional is not None:
        parser.add_argument(positional, nargs="+", metavar=positional.upper().removesuffix("S"))
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    argv = list(argv)
    config = _config_path(parser, argv)
    if config is not None:
        argv = _flags_from_file(parser, config, known | set(retired or {})) + argv
    argv = _without_retired(argv, retired or {})
    namespace, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(_unknown(rest, known))
    values = vars(namespace)
    results = []
    for dataclass_type in dataclass_types:
        names = {field.name for field in dataclasses.fields(dataclass_type) if field.init}
        try:
            results.append(dataclass_type(**{name: values[name] for name in names}))
        except (ValueError, TypeError) as error:
            parser.error(str(error))
    if positional is not None:
        setattr(results[0], positional, values[positional])
    return tuple(results)


def _config_path(parser: _Parser, argv: list[str]) -> str | None:
    for place, word in enumerate(argv):
        if word == "--config":
            if place + 1 == len(argv):
                parser.error("--config needs a file.")
            return argv[place + 1]
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None


def _flags_from_file(parser: _Parser, path: str, known: set[str]) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        parser.error(f"cannot read the configuration {path}: {error.strerror}.")
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        parser.error(f"the configuration {path} is malformed: {error}")
    if not isinstance(content, dict):
        parser.error(f"the configuration {path} must be a mapping of flags to values.")
    for name in content:
        if name not in known:
            parser.error(f"{path}: {_unknown([f'--{name}'], known)}")
    return flag_words(content)


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags and values as words of a command line; a flag whose value is None or an empty list is left out."""
    words = []
    for name, value in flags.items():
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(_word, values)]
    return words


def _word(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


class FlagChecker:
    """Checks the flags that a file holds for a command which is started later, before anything is.

    Attributes:
        names: of all flags of the command.
    """

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        self._parser = _RaisingParser(list(dataclass_types), allow_abbrev=False, add_help=False)
        self.names = {option.lstrip("-") for action in self._parser._actions for option in action.option_strings}

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses unknown flags.

        Raises:
            ValueError: naming it and the nearest flag.
        """
        unknown = [f"--{name}" for name in names if name not in self.names]
        if unknown:
            raise ValueError(_unknown(unknown, self.names))

    def values(self, flags: Mapping[str, Any], dataclass_types: Sequence[type]) -> tuple[Any, ...]:
        """Instances of some of the command's dataclasses, as the flags make them.

        Raises:
            ValueError: if there is no such flag, or a value does not fit its flag.
        """
        self.check_names(flags)
        return self.parsed(flag_words(flags), dataclass_types)

    def parsed(self, words: Sequence[str], dataclass_types: Sequence[type]) -> tuple[Any, ...]:
        """As `values`, of flags as they stand on a command line."""
        namespace, rest = self._parser.parse_known_args(words)
        if rest:
            raise ValueError(_unknown(rest, self.names))
        return tuple(
            kind(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(kind) if field.init})
            for kind in dataclass_types
        )


def _without_retired(argv: list[str], retired: Mapping[str, str]) -> list[str]:
    kept: list[str] = []
    skipping = False
    for word in argv:
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("--") and name in retired:
            logger.warning(f"--{name} is ignored: {retired[name]}")
            skipping = "=" not in word
            continue
        if skipping and not word.startswith("--"):
            continue
        skipping = False
        kept.append(word)
    return kept


def _unknown(rest: list[str], known: set[str]) -> str:
    parts = []
    for word in rest:
        if not word.startswith("--"):
            continue
        name = word.lstrip("-").partition("=")[0]
        if name in _RENAMED:
            parts.append(f"--{name} is no more: use {_RENAMED[name]}")
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        parts.append(f"unknown flag --{name}" + (f" (did you mean --{near[0]}?)" if near else ""))
    return "; ".join(parts) or f"unexpected values: {' '.join(rest)}"


def fail(message: str) -> None:
    """Ends a command with a message for the user and exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)
