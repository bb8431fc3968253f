"""Writes rows as JSON lines, the files that most tests read."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(path: Path, *rows: object) -> Path:
    """Writes one line per row, and the missing parent folders; a row that is text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path
