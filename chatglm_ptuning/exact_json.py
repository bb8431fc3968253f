"""JSON whose numbers stay as they are written: `12.50`, `1E400`, `-0` and integers of any length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_MARK = "\0"
_MARKED = re.compile(r'"\\u0000([-+.0-9eE]+)\\u0000"')
_LONGEST_INT = 4300  # digits; Python converts no longer ones


class WrittenNumber(float):
    """A number whose text Python would write in another way.

    Attributes:
        written: its text, which `repr` and `dumps` write again.
    """

    written: str

    def __new__(cls, written: str | float) -> WrittenNumber:  # noqa: D102
        number = super().__new__(cls, written)
        number.written = str(written)
        return number

    def __repr__(self) -> str:
        return self.written


def _float(written: str) -> float:
    value = float(written)
    return value if repr(value) == written else WrittenNumber(written)


def _int(written: str) -> int | float:
    return WrittenNumber(written) if written == "-0" or len(written) > _LONGEST_INT else int(written)


NUMBERS: dict[str, Any] = {"parse_float": _float, "parse_int": _int}
"""Arguments of `json.loads` and `json.JSONDecoder`."""


def loads(text: str) -> Any:
    """As `json.loads`, with numbers that `dumps` writes as they were."""
    return json.loads(text, **NUMBERS)


def dumps(value: Any, indent: int | None = None) -> str:
    """As `json.dumps`, with characters as they are, and numbers as they were written."""
    text = json.dumps(_marked(value), ensure_ascii=False, indent=indent)
    return _MARKED.sub(r"\1", text) if "\\u0000" in text else text


def _marked(value: Any) -> Any:
    # `json` writes subclasses of float by float's own repr.
    if isinstance(value, WrittenNumber):
        return f"{_MARK}{value.written}{_MARK}"
    if isinstance(value, Mapping):
        return {name: _marked(entry) for name, entry in value.items()}
    return [_marked(entry) for entry in value] if isinstance(value, (list, tuple)) else value
