"""The pages for users: every command line has flags that exist, and every link leads somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import string
from functools import cache
from pathlib import Path

import pytest

from chatglm_ptuning import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "data/*.md", "data/*/*.md", "ds_config/*.md", "scripts/*/*.md")
    for path in ROOT.glob(pattern)
)
SCRIPTS = {
    "train": "train",
    "ds_train": "train",
    "chat": "chat",
    "evaluate": "evaluate",
    "serve": "serve",
    "web_demo": "web_demo",
}
OTHER_PROGRAMS = {"--local-dir", "--repo-type", "--model_args", "--tensor-parallel-size", "--gpu-memory-utilization",
                  "--max-num-seqs", "--max-model-len", "--max-num-batched-tokens"}  # fmt: skip
"""Flags in the text that belong to `hf download`, lm-eval and vLLM."""


def text_of(page: Path) -> str:
    return (ROOT / page).read_text("utf-8")


def shell_lines(page: Path) -> list[str]:
    """Every command of the page's bash blocks, without comments, with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@cache
def flags_of(*command: str) -> set[str]:
    """The flags that a command's own help lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    return set(re.findall(r"--[a-z]\w*", printed.getvalue()))


@cache
def all_flags() -> set[str]:
    parts = {"data": ("show", "check"), "tasks": ("show",)}
    commands = [(name, part) for name in cli.COMMANDS for part in parts.get(name, ("",))]
    return set().union(*(flags_of(*filter(None, command)) for command in commands))


def used_commands(line: str) -> list[tuple[tuple[str, ...], list[str]]]:
    """The kit's commands in a line of shell, each with its flags."""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        script = re.fullmatch(r"(?:.*/)?scripts/(\w+)\.sh", word)
        if script and script[1] in SCRIPTS:
            command, rest = (SCRIPTS[script[1]],), words[place + 1 :]
        elif word == "chatglm-ptuning" or (word == "chatglm_ptuning" and words[place - 1] == "-m"):
            count = 2 if words[place + 1] in ("data", "tasks") and len(words) > place + 2 else 1
            command, rest = tuple(words[place + 1 : place + 1 + count]), words[place + 1 + count :]
        else:
            continue
        # What stands behind `--` of `compare` are flags of `train`.
        own, passed_on = (rest[: rest.index("--")], rest[rest.index("--") :]) if "--" in rest else (rest, [])
        return [
            (command, [word.partition("=")[0] for word in own if word.startswith("--")]),
            (("train",), [word for word in passed_on if word.startswith("--") and word != "--"]),
        ]
    return []


def test_the_commands_of_the_readme_are_found():
    found = {command[0] for line in shell_lines(Path("README.md")) for command, _ in used_commands(line)}
    assert {"train", "chat", "evaluate"} <= found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_have_flags_that_exist(page):
    for line in shell_lines(page):
        for command, flags in used_commands(line):
            if flags:
                assert command[0] in cli.COMMANDS, line
                assert set(flags) - {"--help"} <= flags_of(*command), line


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_variables_of_the_scripts_exist(page):
    known = "\n".join(path.read_text("utf-8") for path in (ROOT / "scripts").glob("*.sh"))
    for line in shell_lines(page):
        if used_commands(line) and "scripts/" in line:
            for name in re.findall(r"(?:^|\s)([A-Z][A-Z_]+)=", line):
                assert re.search(rf"\b{name}\b", known), line


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parts[0] in ("README.md", "README_zh.md", "docs")], ids=str
)
def test_flags_in_the_text_exist(page):
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    named = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named - OTHER_PROGRAMS <= all_flags()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    dropped = string.punctuation.replace("-", "").replace("_", "")
    return {title.strip().lower().translate(str.maketrans(" ", "-", dropped)) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link
