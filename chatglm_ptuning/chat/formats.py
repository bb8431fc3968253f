"""The registry of chat formats: names to formats; a new one is registered here."""

from __future__ import annotations

from chatglm_ptuning.chat.chatglm2 import ChatGLM2Rounds
from chatglm_ptuning.chat.chatglm3 import ChatGLM3Roles
from chatglm_ptuning.chat.format import ChatFormat, Vocabulary
from chatglm_ptuning.chat.glm4 import GLM4Roles
from chatglm_ptuning.chat.plain import PlainText

CHAT_FORMATS: tuple[type[ChatFormat], ...] = (
    ChatGLM3Roles,
    ChatGLM2Rounds,
    GLM4Roles,
    PlainText,
)
"""If the format of a base is not recognised, it is the first one that its vocabulary supports."""


def formats_of(vocabulary: Vocabulary) -> dict[str, type[ChatFormat]]:
    """The formats that a vocabulary supports, by name."""
    return {chat_format.name: chat_format for chat_format in CHAT_FORMATS if chat_format.fits(vocabulary)}
