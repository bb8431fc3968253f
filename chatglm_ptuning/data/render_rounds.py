"""ChatGLM2's chat format: one text of numbered rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.rendered import ONE_ANSWER, Rendered, start_ids, text_ids

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_NO_TOOLS = "ChatGLM2's format has no tools; use a ChatGLM3 or GLM-4 base, or leave out tool calls and observations"


def render(asked: Conversation, answer: Message | None, tokenizer: ChatGLMTokenizer) -> Rendered:
    """See `chat_format.render`."""
    if any(message.loss for message in asked.messages):
        raise ValueError(ONE_ANSWER)
    if asked.tools:
        raise ValueError(_NO_TOOLS)
    prompt = asked.source_prefix + _prompt(asked.messages)
    ids = start_ids(tokenizer) + text_ids(tokenizer, prompt)
    mask = [False] * len(ids)
    start = len(ids)
    if answer:
        _check_plain(answer)
        ids += [*text_ids(tokenizer, answer.content), tokenizer.eos_token_id]
        mask += [answer.loss] * (len(ids) - start)
    return Rendered(ids, mask, start)


def _prompt(messages: Sequence[Message]) -> str:
    """The official text up to the last `答：` (build_prompt of tokenization_chatglm.py, ChatGLM2-6B)."""
    first = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))
    for message in messages[:first]:
        _check_plain(message)
    text = "".join(f"{message.content}\n\n" for message in messages[:first])
    rounds = messages[first:]
    for index, message in enumerate(rounds):
        _check_plain(message)
        if message.role != ("user", "assistant")[index % 2]:
            break
        if message.role == "user":
            text += f"[Round {index // 2 + 1}]\n\n问：{message.content}\n\n答："
        else:
            text += f"{message.content}\n\n"
    else:
        if len(rounds) % 2:
            return text
    raise ValueError(
        "ChatGLM2's format needs messages that alternate between user and assistant, system messages before them; "
        f"found {', '.join(message.role for message in messages)} in front of an answer"
    )


def _check_plain(message: Message) -> None:
    if message.role == "observation" or message.metadata or message.tools:
        raise ValueError(_NO_TOOLS)
