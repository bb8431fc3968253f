"""A conversation as token ids in the chat format of its tokenizer, with a mask of what is to be learned."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatglm_ptuning.data import render_plain, render_roles, render_rounds
from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.rendered import Rendered
from chatglm_ptuning.model.chat_templates import CHAT_FORMATS, ROLE_FORMATS

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

__all__ = ["Rendered", "reference_text", "render", "split_for_training"]


def render(conversation: Conversation, tokenizer: ChatGLMTokenizer, for_generation: bool = False) -> Rendered:
    """Ids and loss mask of a conversation in the chat format of the tokenizer.

    Both begin with the tokens that every sequence starts with, `[gMASK]` and `sop`.

    - `chatglm2`: everything before the last answer is one text, the official prompt (`[Round i]`, with the texts of
      system messages and the source prefix in front), encoded as a whole; the last answer is encoded by itself. As the
      official prompt holds earlier answers without an end token, only the last answer can be learned:
      `split_for_training` makes several conversations out of one.
    - `chatglm3`, `glm4`: every message is its role token, the encoded line of the metadata, and the encoded content;
      the source prefix stands in front of the first user message's text. Of an answer, all behind `<|assistant|>` is
      learned, and the token that ends it: the role token that follows, or an end token (`render_roles.end_token`).
    - `base`, of bases that know no chat: as `chatglm2`, with the texts and nothing between them; `eos` ends the answer.

    Args:
        for_generation: leave out the last message if it is an answer, and end where one begins.

    Raises:
        ValueError: for an unknown `chat_format`, and for what the format has no form for: in `chatglm2` and `base`
            tools, and an answer to be learned that is not the last message; in `chatglm2` also messages that do not
            alternate between user and assistant.
    """
    messages = conversation.messages
    answer = messages[-1] if messages and messages[-1].role == "assistant" else None
    asked = replace(conversation, messages=messages[:-1] if answer else messages)
    if for_generation:
        answer = None
    chat_format = tokenizer.chat_format
    if chat_format == "chatglm2":
        return render_rounds.render(asked, answer, tokenizer)
    if chat_format in ROLE_FORMATS:
        return render_roles.render(asked, answer, tokenizer, for_generation)
    if chat_format == "base":
        return render_plain.render(asked, answer, tokenizer)
    raise ValueError(f"unknown chat format {chat_format!r}; known are {', '.join(CHAT_FORMATS)}")


def split_for_training(conversation: Conversation, tokenizer: ChatGLMTokenizer) -> list[Conversation]:
    """Conversations that hold, together, every answer to be learned once, each ending with one.

    In `chatglm2` and `base`, one for each answer to be learned with all that precedes it as history, exactly as the
    model meets it in a chat. In the formats with roles it is the conversation itself, up to its last answer to be
    learned.
    """
    if tokenizer.chat_format in ROLE_FORMATS:
        whole = conversation.until_last_learned()
        return [whole] if whole.messages else []
    parts = []
    for index, message in enumerate(conversation.messages):
        if message.loss:
            history = [old.not_learned() for old in conversation.messages[:index]]
            parts.append(replace(conversation, messages=[*history, message]))
    return parts


def reference_text(answer: Message, tokenizer: ChatGLMTokenizer) -> str:
    """What a model that gives this answer writes; a tool call is the tool's name and, on the next line, the call."""
    written = render_roles.written_out(answer, tokenizer.chat_format)
    return f"{written.metadata}\n{written.content}" if written.metadata else written.content
