"""Recognises the chat format of a base from the files of its folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from chatglm_ptuning.chat.formats import formats_of
from chatglm_ptuning.chat.plain import PlainText
from chatglm_ptuning.files import read_json_object_or_empty
from chatglm_ptuning.model.checkpoint_formats import last_part
from chatglm_ptuning.model.vocabulary import Vocabulary

logger = logging.get_logger(__name__)


class FolderSettings:
    """The settings in the files beside a vocabulary; a missing or unreadable file has none.

    Attributes:
        chat_format: the chat format that `save_pretrained` of this kit's tokenizer recorded.
        templates: the chat templates in chat_template.jinja and tokenizer_config.json, as far as there are any.
        names: names of the base in config.json and tokenizer_config.json, in this order: some official
            tokenizer_config.json still have the name of the base that the model was made from.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json_object_or_empty(folder / "tokenizer_config.json")
        self.chat_format: str | None = config.get("chat_format")
        file = folder / "chat_template.jinja"
        templates = (file.read_text(encoding="utf-8-sig") if file.is_file() else None, config.get("chat_template"))
        self.templates = [template for template in templates if template is not None]
        named = (read_json_object_or_empty(folder / "config.json").get("_name_or_path"), config.get("name_or_path"))
        self.names = [name for name in named if isinstance(name, str)]


def recognise_chat_format(
    vocabulary: Vocabulary, chat_template: Any, locations: Iterable[str], names: Iterable[str]
) -> str:
    """The chat format of a base whose files do not record it, among those that its vocabulary supports.

    It is recognised by, in this order: the name of its folder, if this is an official base without chat; its chat
    template; the name of its folder; the names in its files. Otherwise it is the first format of the vocabulary, with a
    warning.

    Args:
        chat_template: jinja text, several by name, or None.
        locations: paths or hub names; only the last part of a path counts, in the hub's cache the repository.
        names: names of the base in the folder's files.
    """
    formats = formats_of(vocabulary)
    locations = [last_part(location) for location in locations]
    if any(PlainText.base_names.fullmatch(location) for location in locations):
        return PlainText.name
    template = str(chat_template or "")
    for name, chat_format in formats.items():
        if chat_format.template_sign and chat_format.template_sign in template:
            return name
    for base in [*locations, *map(last_part, names)]:
        for chat_format in (PlainText, *formats.values()):  # "chatglm3-6b-base" is no ChatGLM3
            if chat_format.base_names.fullmatch(base):
                return chat_format.name
    first, *others = formats
    alternatives = " or ".join(f'chat_format="{other}"' for other in others)
    logger.warning_once(
        f"The files beside {vocabulary.path.name} do not identify the chat format of this base, so {first} is used. "
        f"For another, set {alternatives} in the tokenizer or in tokenizer_config.json."
    )
    return first
