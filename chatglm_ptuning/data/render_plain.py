"""Bases that were never taught a chat format: they continue a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.rendered import ONE_ANSWER, Rendered, start_ids, text_ids

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_NO_TOOLS = "a base without chat format has no tools; use a chat model, or leave out tools, tool calls and observations"


def render(asked: Conversation, answer: Message | None, tokenizer: ChatGLMTokenizer) -> Rendered:
    """See `chat_format.render`."""
    if any(message.loss for message in asked.messages):
        raise ValueError(ONE_ANSWER)
    plain = [*asked.messages, answer] if answer else asked.messages
    if asked.tools or any(message.role == "observation" or message.metadata or message.tools for message in plain):
        raise ValueError(_NO_TOOLS)
    prompt = asked.source_prefix + "".join(message.content for message in asked.messages)
    ids = start_ids(tokenizer) + text_ids(tokenizer, prompt)
    mask = [False] * len(ids)
    start = len(ids)
    if answer:
        ids += [*text_ids(tokenizer, answer.content), tokenizer.eos_token_id]
        mask += [answer.loss] * (len(ids) - start)
    return Rendered(ids, mask, start)
