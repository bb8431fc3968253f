"""The chat formats of ChatGLM2 and ChatGLM3: a conversation as token ids, with a mask of what is to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatglm_ptuning.data.conversation import Conversation, Message

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

# What may follow an answer. `<|assistant|>` is among them because ChatGLM3 says what it thinks and then calls a tool in
# two assistant messages in a row, without stopping between them.
_ENDS_AN_ANSWER = ("user", "observation", "assistant")


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids.

    Attributes:
        input_ids: `[seq_len]`.
        loss_mask: `[seq_len]`; True where the id is to be learned, that is predicted from those before it. It is made
            by position, so that an id which serves as padding elsewhere is learned like any other.
        answer_start: index of the first id of the last answer; the ids before it are the prompt to generate it from.
            The length if there is no such answer.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    answer_start: int


def render(conversation: Conversation, tokenizer: ChatGLMTokenizer, for_generation: bool = False) -> Rendered:
    """Ids and loss mask of a conversation in the chat format of the tokenizer.

    Both begin with `[gMASK] sop`.

    - `chatglm2`: everything before the last answer is one text, the official prompt (`[Round i]`, with the texts of
      system messages and the source prefix in front), encoded as a whole; the last answer is encoded by itself. As the
      official prompt holds earlier answers without an end token, only the last answer can be learned:
      `split_for_training` makes several conversations out of one.
    - `chatglm3`: every message is its role token, the encoded line of the metadata, and the encoded content; the source
      prefix stands in front of the first user message's text. Of an answer, all behind `<|assistant|>` is learned, and
      the token that ends it: the role token that follows, or `</s>`.

    `</s>` ends the ids if the last message is an answer.

    Args:
        for_generation: leave out the last message if it is an answer, and end with the prompt for one, `答：` or
            `<|assistant|>`.

    Raises:
        ValueError: for an unknown `chat_format`; in `chatglm2` also for tool calls and observations, for messages that
            do not alternate between user and assistant, and for an answer to be learned that is not the last message.
    """
    messages = conversation.messages
    answer = messages[-1] if messages and messages[-1].role == "assistant" else None
    asked = messages[:-1] if answer else messages
    if for_generation:
        answer = None
    if tokenizer.chat_format == "chatglm2":
        return _render_chatglm2(asked, answer, conversation.source_prefix, tokenizer)
    if tokenizer.chat_format == "chatglm3":
        return _render_chatglm3(asked, answer, conversation.source_prefix, tokenizer, for_generation)
    raise ValueError(f"unknown chat format {tokenizer.chat_format!r}; known are chatglm2 and chatglm3")


def split_for_training(conversation: Conversation, tokenizer: ChatGLMTokenizer) -> list[Conversation]:
    """Conversations that hold, together, every answer to be learned once, each ending with one.

    In `chatglm3` that is the conversation itself, up to its last answer to be learned. In `chatglm2`, one for each
    answer to be learned with all that precedes it as history, exactly as the model meets it in a chat.
    """
    if tokenizer.chat_format != "chatglm2":
        whole = conversation.until_last_learned()
        return [whole] if whole.messages else []
    parts = []
    for index, message in enumerate(conversation.messages):
        if message.loss:
            history = [Message(old.role, old.content, old.metadata) for old in conversation.messages[:index]]
            parts.append(Conversation([*history, message], conversation.source_prefix))
    return parts


def _start(tokenizer: ChatGLMTokenizer) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in ("[gMASK]", "sop")]


def _render_chatglm2(
    asked: Sequence[Message], answer: Message | None, source_prefix: str, tokenizer: ChatGLMTokenizer
) -> Rendered:
    if any(message.loss for message in asked):
        raise ValueError(
            "in ChatGLM2's format only the last answer of a conversation can be learned; "
            "use split_for_training to make one conversation of each"
        )
    prompt = source_prefix + _chatglm2_prompt(asked)
    ids = _start(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)
    mask = [False] * len(ids)
    start = len(ids)
    if answer:
        _check_plain(answer)
        ids += [*tokenizer.encode(answer.content, add_special_tokens=False), tokenizer.eos_token_id]
        mask += [answer.loss] * (len(ids) - start)
    return Rendered(ids, mask, start)


def _chatglm2_prompt(messages: Sequence[Message]) -> str:
    """The official text up to the last `答：` (build_prompt of tokenization_chatglm.py, ChatGLM2-6B)."""
    first = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))
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
    if message.role == "observation" or message.metadata:
        raise ValueError(
            "ChatGLM2's format has no tools; use a ChatGLM3 base, or leave out tool calls and observations"
        )


def _render_chatglm3(
    asked: Sequence[Message],
    answer: Message | None,
    source_prefix: str,
    tokenizer: ChatGLMTokenizer,
    for_generation: bool,
) -> Rendered:
    ids = _start(tokenizer)
    mask = [False] * len(ids)
    learned = False  # whether the message before is learned, and so the token that ends it
    for message in asked:
        ids.append(tokenizer.convert_tokens_to_ids(f"<|{message.role}|>"))
        mask.append(learned and message.role in _ENDS_AN_ANSWER)
        prefix, source_prefix = (source_prefix, "") if message.role == "user" else ("", source_prefix)
        body = _chatglm3_body(message, prefix, tokenizer)
        learned = message.loss
        ids += body
        mask += [learned] * len(body)
    if answer or for_generation:
        ids.append(tokenizer.convert_tokens_to_ids("<|assistant|>"))
        mask.append(learned)
    start = len(ids)
    if answer:
        ids += [*_chatglm3_body(answer, "", tokenizer), tokenizer.eos_token_id]
        mask += [answer.loss] * (len(ids) - start)
    return Rendered(ids, mask, start)


def _chatglm3_body(message: Message, prefix: str, tokenizer: ChatGLMTokenizer) -> list[int]:
    """What follows the role token (build_single_message of tokenization_chatglm.py, ChatGLM3-6B)."""
    line = tokenizer.encode(f"{message.metadata}\n", add_special_tokens=False)
    return line + tokenizer.encode(prefix + message.content, add_special_tokens=False)
