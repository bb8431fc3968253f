"""`chatglm-ptuning import`: makes a prefix of this kit, and a base in the official format, of another program's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.exchange.base_folders import write_official_base
from chatglm_ptuning.exchange.export import FORMATS, ExchangeArguments
from chatglm_ptuning.model.arguments import DEFAULT_MODEL
from chatglm_ptuning.model.base_files import BaseFiles
from chatglm_ptuning.model.prefix_encoder import encoder_of
from chatglm_ptuning.model.stored_prefix import read_stored_prefix
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.fingerprint import difference
from chatglm_ptuning.prefix.fit import check_base
from chatglm_ptuning.prefix.formats import exchange_format, kit, read_prefix

BASE_FOLDER = "base"
"""Folder for the base beside the prefix that was in one folder with it."""


@dataclass(kw_only=True)
class ImportArguments(ExchangeArguments):
    """Flags of `chatglm-ptuning import`."""

    from_format: str = field(metadata={"help": "format to read", "aliases": ["--from"], "choices": FORMATS})
    input_dir: str = field(metadata={"help": "folder in that format"})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "base of the prefix (default: the bundled nano); with --from official-merged and hf-glm, "
                          "whose folder holds the base, only checked to be the same"},
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Entry of the command; user errors end it with a message and exit code 1."""
    (args,) = parse_arguments(
        "chatglm-ptuning import",
        "Make a prefix of this kit, and a base in the official format, of another program's folder.",
        (ImportArguments,),
        argv,
    )
    try:
        import_folder(args)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def import_folder(args: ImportArguments) -> None:
    """Writes what the folder of another program holds, completely or not at all.

    Raises:
        ValueError: naming what is faulty or does not fit; if the output folder is not empty.
        OSError: if a file is missing, or the disk is full.
        ImportError: if a hub's package is missing.
    """
    source, output = Path(args.input_dir), Path(args.output_dir)
    args.check_apart(source)
    if not source.exists():
        raise FileNotFoundError(f"There is no folder {source}.")
    with args.writing() as folder:
        if args.from_format not in ("official-merged", "hf-glm"):
            base = args.base_files(args.model_name_or_path or DEFAULT_MODEL)
            found, place = exchange_format(source)
            checkpoint = read_prefix(place, base.config.prefix_shape)
            if found != args.from_format:
                instead = f"use --from {found}" if found in FORMATS else "every command reads it as it is"
                raise ValueError(f"{place} holds a prefix in the format {found}, not {args.from_format}: {instead}.")
            check_base(checkpoint, base.config.prefix_shape, base.config.name_or_path, base.fingerprint)
            _write_prefix(checkpoint, base, folder)
            print(f"{output} holds the prefix.")
            return
        base = BaseFiles(source)
        _check_same(base, args)
        if args.from_format == "hf-glm":
            if not base.is_glm:
                raise ValueError(
                    f"{source} is a base in the official format, not in that of GlmForCausalLM (model_type glm): "
                    "every command reads it as it is."
                )
            write_official_base(base, folder)
            print(f"{output} holds the base.")
            return
        checkpoint = read_stored_prefix(source, base.config)
        if checkpoint is None:
            raise ValueError(
                f"{source} holds no prefix among its weights. A folder with a prefix alone is --from official."
            )
        _write_prefix(checkpoint, base, folder)
        (folder / BASE_FOLDER).mkdir()
        write_official_base(base, folder / BASE_FOLDER)
    print(f"{output} holds the prefix, {output / BASE_FOLDER} its base.")


def _check_same(base: BaseFiles, args: ImportArguments) -> None:
    """Checks that a folder holds the base of the flags, if they name one.

    Raises:
        ValueError: naming both and what differs.
    """
    if args.model_name_or_path is not None:
        what = difference(args.base_files().fingerprint(), base.fingerprint())
        if what is not None:
            raise ValueError(f"{base.folder} holds another base than {args.model_name_or_path}: {what}.")


def _write_prefix(checkpoint: PrefixCheckpoint, base: BaseFiles, folder: Path) -> None:
    """Writes a prefix as one of this kit for a base.

    Raises:
        ValueError: if it is incomplete.
    """
    encoder_of(checkpoint, base.config)  # checks that no parameter is missing
    name, fingerprint = base.config.name_or_path or None, base.fingerprint()
    metadata = replace(checkpoint.metadata, base_model_name=name, base_fingerprint=fingerprint)
    kit.write(folder, metadata, checkpoint.parameters)
