"""YAML files of users, read strictly: every complaint names the file, the key and the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from chatglm_ptuning.data.sources.text import read_text


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds.

    Args:
        what: the kind of file, for the message.

    Raises:
        ValueError: naming file and line, if the file is missing, not UTF-8, not YAML, or has a key twice.
    """
    if not path.is_file():
        there = [child.name for child in sorted(path.parent.glob("*.y*ml"))]
        raise ValueError(f"There is no {what} {path}{nearest(path.name, there)}.")
    text = read_text(path)
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        place = path if error.problem_mark is None else f"{path}:{error.problem_mark.line + 1}"
        begun = f" {error.context} from line {error.context_mark.line + 1}" if error.context_mark else ""
        raise ValueError(f"{place}: not valid YAML: {error.problem}{begun}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"{path}:{line}: not valid YAML: the character U+{error.character:04X} may not stand there."
        ) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key that stands twice is refused instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As in PyYAML."""
        seen: set[Hashable] = set()
        for key, _ in node.value:
            value = self.construct_object(key, deep=True)  # True equals 1, and would take its place
            if not isinstance(value, Hashable):
                continue  # PyYAML has a message for it
            if value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(value)
        return super().construct_mapping(node, deep)


class FieldChecker:
    """Takes the content of a file apart; every complaint names the file.

    Args:
        origin: the file.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def fail(self, text: str) -> NoReturn:
        """Refuses the file."""
        raise ValueError(f"{self.origin}: {text}")

    def mapping(self, value: Any, what: str) -> Mapping[str, Any]:
        """The value, which must be a mapping."""
        if not isinstance(value, Mapping):
            self.fail(f"{what} must be a mapping of keys to values, found {kind_of(value)}.")
        return value

    def known_keys(self, content: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
        """Refuses keys that are not known, naming the nearest that is."""
        for key in content:
            if key not in known:
                self.fail(f"unknown {what} {key!r}{nearest(key, known)}; known are {', '.join(known)}.")

    def one_of(self, value: Any, known: Sequence[str] | Mapping[str, Any], what: str) -> str:
        """The value, which must be one of the known ones."""
        if not isinstance(value, str) or value not in known:
            self.fail(f"unknown {what} {value!r}{nearest(value, list(known))}; known are {', '.join(known)}.")
        return value

    def text(self, value: Any, what: str) -> str:
        """The value, which must be a text that is not blank."""
        if not isinstance(value, str) or not value.strip():
            self.fail(f"'{what}' must be text, found {value!r}{quote_hint(value)}.")
        return value

    def texts(self, value: Any, what: str) -> tuple[str, ...]:
        """The values, which must be texts; one text stands for a list of one."""
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, Sequence):
            self.fail(f"'{what}' must be text or a list of texts, found {kind_of(value)}.")
        return tuple(self.text(entry, what) for entry in values)

    def text_mapping(self, value: Any, what: str) -> dict[str, str]:
        """The value, which must map texts to texts."""
        return {self.text(key, what): self.text(entry, f"{what}.{key}") for key, entry in
                self.mapping(value, f"'{what}'").items()}  # fmt: skip

    def positive_int(self, value: Any, what: str) -> int:
        """The value, which must be a whole number from 1."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(f"'{what}' must be a whole number from 1, found {value!r}.")
        return value

    def positive_float(self, value: Any, what: str) -> float:
        """The value, which must be a number above 0."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            hint = " (YAML reads 5e-3 as text: write 5.0e-3)" if isinstance(value, str) else ""
            self.fail(f"'{what}' must be a number above 0, found {value!r}{hint}.")
        return float(value)

    def flag(self, value: Any, what: str) -> bool:
        """The value, which must be true or false."""
        if not isinstance(value, bool):
            self.fail(f"'{what}' must be true or false, found {value!r}.")
        return value


def nearest(value: Any, known: Sequence[str]) -> str:
    """For a message: the known value nearest to one that is not; empty if none is near."""
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def kind_of(value: Any) -> str:
    """For a message: what a value is."""
    names: dict[type, str] = {list: "a list", str: "text", type(None): "nothing", dict: "a mapping"}
    return names.get(type(value), f"{value!r}")


def quote_hint(value: Any) -> str:
    """For a message: that YAML has made another type of a text."""
    return (
        " (YAML reads yes, no, true, false and numbers as such: put it in quotes)"
        if isinstance(value, (bool, int, float))
        else ""
    )
