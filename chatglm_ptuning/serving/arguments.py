"""Flags of the commands that serve a folder of prefixes to others."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from chatglm_ptuning.model.arguments import BaseArguments
from chatglm_ptuning.prefix.latest import runs_folder


@dataclass
class FolderArguments(BaseArguments):
    """The base, and where its prefixes are."""

    prefix_dir: str = field(
        default_factory=lambda: str(runs_folder()),
        metadata={"help": "folder whose subfolders are prefixes or training runs; a prefix has the name of its folder "
                          "(default: $CHATGLM_PTUNING_OUTPUT or output)"},
    )  # fmt: skip


def is_own_address(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
