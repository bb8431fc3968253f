"""Which chat format a base was trained on, from the files of its folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from chatglm_ptuning.chat.formats import formats_of
from chatglm_ptuning.chat.plain import PlainText
from chatglm_ptuning.files import read_json_object_or_empty
from chatglm_ptuning.model.checkpoint_forms import last_part
from chatglm_ptuning.model.vocabulary import Vocabulary

logger = logging.get_logger(__name__)


class FolderSettings:
    """What the files beside a vocabulary say about its base; a file that is missing or unreadable says nothing.

    Attributes:
        chat_format: as `save_pretrained` of this kit's tokenizer wrote it.
        config_template: the chat template in tokenizer_config.json or chat_template.jinja.
        names: that the base has in config.json and tokenizer_config.json, in this order: some official
            tokenizer_config.json still name the base that the model was made from.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json_object_or_empty(folder / "tokenizer_config.json")
        self.chat_format: str | None = config.get("chat_format")
        self.config_template = config.get("chat_template")
        named = (read_json_object_or_empty(folder / "config.json").get("_name_or_path"), config.get("name_or_path"))
        self.names = [name for name in named if isinstance(name, str)]
        self._template_file = folder / "chat_template.jinja"

    @property
    def template(self) -> Any:
        """The folder's own template."""
        if self._template_file.is_file():
            return self._template_file.read_text(encoding="utf-8")
        return self.config_template

    def has_template(self, template: Any) -> bool:
        """Whether the template is the folder's own."""
        return template is not None and template in (self.template, self.config_template)


def recognise_chat_format(
    vocabulary: Vocabulary, chat_template: Any, locations: Iterable[str], names: Iterable[str]
) -> str:
    """The chat format of a base that does not name it, among those that its vocabulary can write.

    The first of these that tells it: where the base lies, if that is called like an official base without chat; its
    chat template; the names of where it lies, and then those that its files give; else the first format of the
    vocabulary, with a warning.

    Args:
        chat_template: jinja text, several by name, or None.
        locations: paths or hub names; of a path only the last part counts, of the hub's cache the repository.
        names: that the folder's files give.
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
        f"Nothing beside {vocabulary.path.name} tells the chat format of this base, so chats are written in that of "
        f"{first}; for another give {alternatives} to the tokenizer or in tokenizer_config.json."
    )
    return first
