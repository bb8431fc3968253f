"""`chatglm-ptuning export`: writes a prefix, a base, or both, in the format of another program."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.exchange.base_folders import official_config, write_glm_base, write_official_base
from chatglm_ptuning.files import write_folder, write_json
from chatglm_ptuning.model.arguments import TokenizerArguments
from chatglm_ptuning.model.base_files import BaseFiles
from chatglm_ptuning.model.hub import find_base
from chatglm_ptuning.model.prefix_encoder import encoder_of
from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.fit import check_base
from chatglm_ptuning.prefix.formats import KEY_VALUE_WRITERS, official, read_prefix, vllm

FORMATS = ("official", "official-merged", "hf-glm", "vllm", *KEY_VALUE_WRITERS)
_USE = {
    "official": "For the official web_demo.py (as its ptuning_checkpoint) and Langchain-Chatchat, beside the base. It "
                "holds no base: programs that take one folder for both need --to official-merged.",
    "official-merged": "A base and its prefix in one folder, for converters such as chatglm.cpp's.",
    "hf-glm": "For transformers (GlmForCausalLM) and engines that read its format.",
    "peft": "For PeftModel.from_pretrained(model, folder), on the base of --to hf-glm as model.",
    "peft-cartridge": "For PeftModel.from_pretrained(model, folder), on the base of --to hf-glm as model.",
    "vllm": "For vLLM with this kit's plugin; the name of the prefix is that of the folder. `chatglm-ptuning serve "
            "--engine vllm` needs no export.",
}  # fmt: skip
_DIVIDED_POSITIONS = (
    "This base divides positions by rope_ratio. The official code of ChatGLM2-6B-32K does so, too; chatglm.cpp and the "
    "code of later bases multiply the rotary base instead, and would compute something else."
)


@dataclass(kw_only=True)
class ExchangeArguments(TokenizerArguments):
    """Flags that `export` and `import` share."""

    output_dir: str = field(metadata={"help": "folder to write to; must be new or empty"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace the weights and settings that are in --output_dir"}
    )

    def base_files(self, model_name_or_path: str | None = None) -> BaseFiles:
        """The files of a base, by default that of the flags.

        Raises:
            FileNotFoundError, ConnectionError, ImportError: as `find_base`.
            ValueError: as `BaseFiles`; if the output folder is that of the base.
        """
        folder = find_base(model_name_or_path or self.model_name_or_path, self.hub, self.revision)
        self.check_apart(folder)
        base = BaseFiles(folder)
        base.config.name_or_path = str(model_name_or_path or self.model_name_or_path)
        return base

    def check_apart(self, source: str | Path) -> None:
        """Checks that the output folder is not one that is read.

        Raises:
            ValueError: naming it.
        """
        path = Path(source).resolve()
        if Path(self.output_dir).resolve() == (path.parent if path.is_file() else path):
            raise ValueError(f"--output_dir {self.output_dir} is the folder that is read. Name another folder.")

    def writing(self) -> AbstractContextManager[Path]:
        """Gives a folder whose content moves to the output folder at the end, see `write_folder`.

        Raises:
            ValueError: if the output folder is not empty and may not be overwritten.
        """
        output = Path(self.output_dir)
        there = next(output.iterdir(), None) if output.is_dir() else None
        if there is not None and not self.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {output} is not empty: it has {there.name}. Name a new folder, or replace the weights "
                "and settings in it by --overwrite_output_dir."
            )
        return write_folder(output, ("*.safetensors", "*.bin", "*.json"))


@dataclass(kw_only=True)
class ExportArguments(ExchangeArguments):
    """Flags of `chatglm-ptuning export`."""

    to: str = field(metadata={"help": "format to write", "choices": FORMATS})
    ptuning_checkpoint: str | None = field(
        default=None, metadata={"help": "prefix in any format that the kit reads; not written by --to hf-glm"}
    )

    def __post_init__(self) -> None:
        if self.to != "hf-glm" and self.ptuning_checkpoint is None:
            raise ValueError(f"--to {self.to} needs a prefix: name its folder by --ptuning_checkpoint.")


def main(argv: Sequence[str]) -> None:
    """Entry of the command; user errors end it with a message and exit code 1."""
    (args,) = parse_arguments(
        "chatglm-ptuning export",
        "Write a prefix, its base, or both, in the format of another program.",
        (ExportArguments,),
        argv,
    )
    try:
        export(args)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def export(args: ExportArguments) -> None:
    """Writes what the flags say, completely or not at all.

    Raises:
        ValueError: naming what is faulty, does not fit, or cannot be written in the format; if the output folder is
            not empty.
        OSError: if a file is missing, or the disk is full.
        ImportError: if a hub's package is missing.
    """
    output, lacks = Path(args.output_dir), []
    with args.writing() as folder:
        base = args.base_files()
        if args.to == "hf-glm":
            lacks = write_glm_base(base, folder)
            if args.ptuning_checkpoint is not None:
                lacks.append(f"It is the base alone: --to peft exports {args.ptuning_checkpoint} for it.")
        else:
            prefix = args.find_prefix(args.ptuning_checkpoint)
            args.check_apart(prefix)
            checkpoint = _read(prefix, base)
            if args.to == "official-merged":
                lacks = write_official_base(base, folder, checkpoint)
                if base.config.position_interpolation:
                    lacks.append(_DIVIDED_POSITIONS)
            elif args.to == "official":
                official.write(folder, checkpoint.parameters)
                # Without the official classes, converters refuse the folder instead of taking it for a whole base.
                config = official_config(base, checkpoint)
                write_json(folder / "config.json", {key: config[key] for key in config if key != "auto_map"})
            elif args.to == "vllm":
                vllm.write(folder, _folded(checkpoint, base), base.config.prefix_shape, output.resolve().name)
            else:
                KEY_VALUE_WRITERS[args.to](folder, _folded(checkpoint, base), base.config.prefix_shape)
    print(f"{output} holds the {args.to} export. {_USE.get(args.to, '')}", *lacks, sep="\n")


def _read(path: str, base: BaseFiles) -> PrefixCheckpoint:
    """Reads a prefix of the language model and checks that it fits the base.

    Raises:
        FileNotFoundError, ValueError: as `read_prefix` and `check_base`; if it is untrained, or for a linear head.
    """
    checkpoint = read_prefix(path, base.config.prefix_shape)
    check_base(checkpoint, base.config.prefix_shape, base.config.name_or_path, base.fingerprint)
    metadata, source = checkpoint.metadata, checkpoint.source
    if not metadata.trained:
        raise ValueError(f"{source} was saved untrained: its values are random. Train it first.")
    if not checkpoint.generates:
        heads = metadata.head or ", ".join(str(task["head"]) for task in metadata.tasks.values())
        raise ValueError(
            f"{source} was trained with a linear head ({heads}), which no other program has: the prefix "
            "alone would be of no use. Export a prefix that was trained to generate."
        )
    if with_head := checkpoint.tasks_with_head:
        print(f"The heads of the tasks {', '.join(sorted(with_head))} in {source} are not exported.")
    encoder_of(checkpoint, base.config)  # checks that no parameter is missing
    return checkpoint


def _folded(checkpoint: PrefixCheckpoint, base: BaseFiles) -> PrefixCheckpoint:
    """The same prefix without its projection."""
    table = encoder_of(checkpoint, base.config).key_values().detach().flatten(1)
    metadata = replace(checkpoint.metadata, prefix_projection=False, base_model_name=base.config.name_or_path)
    return replace(checkpoint, metadata=metadata, parameters={"embedding.weight": table})
