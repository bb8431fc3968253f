"""Names of tools, and parsing tool calls in any notation of the family's models."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_FENCED = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def inner_part(tool: Any) -> Any:
    """The inner part of OpenAI's `{"type": "function", "function": {...}}`, the only part the family was trained on."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function if isinstance(function, Mapping) else tool


def tool_names(tools: Sequence[Any]) -> list[str]:
    """Names of those tools that are functions."""
    functions = [inner_part(tool) for tool in tools]
    return [tool["name"] for tool in functions if isinstance(tool, Mapping) and isinstance(tool.get("name"), str)]


def call_arguments(content: str) -> dict[str, Any] | None:
    """The arguments of a tool call: a JSON object, a literal or `tool_call(name=literal, ...)`; None for other texts.

    The text of the model is parsed, never run.
    """
    fenced = _FENCED.search(content)
    code = (fenced.group(1) if fenced else content).strip()
    try:
        arguments = json.loads(code)
    except ValueError:
        arguments = _literal_arguments(code)
    except RecursionError:
        return None
    return arguments if isinstance(arguments, dict) else None


def _literal_arguments(code: str) -> Any:
    try:
        expression = ast.parse(code, mode="eval").body
        if not isinstance(expression, ast.Call):
            return ast.literal_eval(expression)
        if expression.args or any(keyword.arg is None for keyword in expression.keywords):
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in expression.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
