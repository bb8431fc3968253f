"""Strict reading of users' YAML files: every error names the file, the line, the key and the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from chatglm_ptuning.data.sources.text import read_text

FORBID = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
"""Configuration of the dataclasses that files are read into: unknown keys are refused."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must be text that is not blank")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""A list of texts; a single text is a list of one."""
Flag = StrictBool
Count = Annotated[int, Field(strict=True, ge=1)]
PositiveNumber = Annotated[float, Field(strict=True, gt=0)]

Model = TypeVar("Model")
Place = tuple[Any, ...]
"""Keys and indices from the top of a file to a value."""


@dataclass(frozen=True)
class YamlFile:
    """A parsed YAML file.

    Attributes:
        lines: line number, from 1, of every key and list entry; their places are text.
    """

    path: Path
    content: Any
    lines: Mapping[Place, int]

    def error(self, place: Place, text: str) -> ValueError:
        """The exception about the value at a place."""
        place = tuple(map(str, place))
        while place not in self.lines and place:
            place = place[:-1]
        return ValueError(f"{self.path}:{self.lines.get(place, 1)}: {text}")

    def one_of(self, place: Place, value: Any, known: Iterable[str], what: str) -> None:
        """Checks that a value is a known one.

        Raises:
            ValueError: otherwise, naming file, line and the nearest known value.
        """
        known = list(known)
        if value not in known:
            raise self.error(place, f"unknown {what} {value!r}{nearest(value, known)}; known are {', '.join(known)}.")

    def read(self, model: type[Model], **more: Any) -> Model:
        """The content as a pydantic dataclass. Its validators get the file as their context.

        Args:
            more: values of fields that the file must not set.

        Raises:
            ValueError: naming file, line and key of the first value that does not fit.
        """
        content = self.content
        if not isinstance(content, Mapping):
            raise self.error((), f"must be a mapping of keys to values, found {content!r}.")
        for key in set(content) & set(more):
            raise self.error((key,), _unknown(key, model, (), more))
        try:
            return TypeAdapter(model).validate_python({**content, **more}, context=self)
        except ValidationError as error:
            errors = error.errors()
        # A misspelt key also causes an error about the missing one.
        first = next((found for found in errors if found["type"] in _UNKNOWN), errors[0])
        place = tuple(key for key in first["loc"] if key != "[key]")
        if first["type"] in _UNKNOWN:
            raise self.error(place, _unknown(place[-1], model, place[:-1], more))
        hint = ""
        if first["type"] == "missing" and isinstance(place[-1], str):
            description = _fields(model, place[:-1])[place[-1]].description
            hint = f": {description}" if description else ""
        elif first["type"] == "string_type" and isinstance(first["input"], (bool, int, float)):
            hint = " (YAML reads yes, no, true, false and numbers as such: put it in quotes)"
        elif first["type"] == "float_type" and isinstance(first["input"], str):
            hint = " (YAML reads 5e-3 as text: write 5.0e-3)"
        raise self.error(place, f"{fault_of(first, place)}{hint}.")


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def fault_of(error: ErrorDetails, place: Place) -> str:
    """A validation error of pydantic, as a sentence without a full stop.

    Args:
        place: of the value, without pydantic's own marks.
    """
    value = error["input"]
    key = ".".join(map(str, place))
    if error["type"] == "missing":
        inside = f" in {'.'.join(map(str, place[:-1]))}" if place[1:] else ""
        return f"there is no key '{place[-1]}'{inside}"
    _, should, rule = error["msg"].rpartition("should ")
    rule = str(error["ctx"]["error"]) if error["type"] == "value_error" else should + rule
    if rule.endswith("."):
        return rule[:-1]
    shown = repr(value)
    return f"'{key}' {rule}, found {shown if len(shown) <= 60 else shown[:60] + '...'}".removeprefix("'' ")


def _unknown(key: Any, model: type, place: Place, hidden: Iterable[str]) -> str:
    known = [name for name in _fields(model, place) if place or name not in hidden]
    where = f" of {'.'.join(map(str, place))}" if place else ""
    return f"unknown key {key!r}{where}{nearest(key, known)}; known are {', '.join(known)}."


def _fields(model: Any, place: Place) -> Mapping[str, Any]:
    """The pydantic fields of the dataclass at a place in a model."""
    for key in place:
        fields = getattr(model, "__pydantic_fields__", None)
        model = get_args(model)[-1] if fields is None else fields[key].annotation
        while not hasattr(model, "__pydantic_fields__") and type(None) in get_args(model):
            model = get_args(model)[0]
        if hasattr(model, "__metadata__"):
            model = get_args(model)[0]
    return model.__pydantic_fields__


def read_yaml(path: Path, what: str) -> YamlFile:
    """Reads a YAML file.

    Args:
        what: the kind of file, for the message.

    Raises:
        ValueError: naming file and line, if the file is missing, not UTF-8, not YAML, or has a key twice.
    """
    if not path.is_file():
        beside = [child.name for child in sorted(path.parent.glob("*.y*ml"))]
        raise ValueError(f"There is no {what} {path}{nearest(path.name, beside)}.")
    text = read_text(path)
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
        return YamlFile(path, content, {} if node is None else dict(_lines(loader, node, ())))
    except yaml.MarkedYAMLError as error:
        place = path if error.problem_mark is None else f"{path}:{error.problem_mark.line + 1}"
        begun = f" {error.context} from line {error.context_mark.line + 1}" if error.context_mark else ""
        raise ValueError(f"{place}: not valid YAML: {error.problem}{begun}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"{path}:{line}: not valid YAML: the character U+{error.character:04X} is not allowed."
        ) from error


def _lines(loader: yaml.SafeLoader, node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    """Every place under a node, with its line number."""
    if isinstance(node, yaml.MappingNode):
        entries = [(loader.construct_object(key, deep=True), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(index, value, value) for index, value in enumerate(node.value)]
    else:
        return
    for key, marked, value in entries:
        yield (*place, str(key)), marked.start_mark.line + 1
        yield from _lines(loader, value, (*place, str(key)))


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As in PyYAML."""
        seen: set[Hashable] = set()
        for key, _ in node.value:
            value = self.construct_object(key, deep=True)
            if not isinstance(value, Hashable):
                continue  # PyYAML itself refuses it
            if value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"duplicate key {key.value!r}", key.start_mark
                )
            seen.add(value)
        return super().construct_mapping(node, deep)


def nearest(value: Any, known: Sequence[str]) -> str:
    """The end of an error message that suggests the most similar known value; empty if none is similar."""
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
