"""The chat formats of ChatGLM3 and GLM-4: every message behind the token of its role."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatglm_ptuning.data.conversation import Conversation, Message
from chatglm_ptuning.data.rendered import Rendered, start_ids, text_ids

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

# What may follow an answer. `<|assistant|>` is among them because the models say what they think and then call a tool
# in two assistant messages in a row, without stopping between them.
_ENDS_AN_ANSWER = ("user", "observation", "assistant")

# The official ChatGLM3 has seen tool definitions and calls in exactly these forms (finetune_demo,
# preprocess_utils.py), so they are part of its chat format.
_CHATGLM3_INTRODUCTION = "Answer the following questions as best as you can. You have access to the following tools:"
_CHATGLM3_CALL = "```python\ntool_call({arguments})\n```"
# GLM-4's words are those of its chat template (tokenizer_config.json of glm-4-9b-chat).
_GLM4_INTRODUCTION = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_GLM4_BEHIND_A_TOOL = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


def render(asked: Conversation, answer: Message | None, tokenizer: ChatGLMTokenizer, for_generation: bool) -> Rendered:
    """See `chat_format.render`."""
    chat_format = tokenizer.chat_format
    ids = start_ids(tokenizer)
    mask = [False] * len(ids)
    source_prefix = asked.source_prefix
    learned = False  # whether the message before is learned, and so the token that ends it
    for message in _with_tools_shown(asked, chat_format):
        ids.append(tokenizer.convert_tokens_to_ids(f"<|{message.role}|>"))
        mask.append(learned and message.role in _ENDS_AN_ANSWER)
        prefix, source_prefix = (source_prefix, "") if message.role == "user" else ("", source_prefix)
        header, body = _body(message, prefix, tokenizer)
        learned = message.loss
        ids += header + body
        mask += [learned] * (len(header) + len(body))
    if answer or for_generation:
        ids.append(tokenizer.convert_tokens_to_ids("<|assistant|>"))
        mask.append(learned)
    start = len(ids)
    header: list[int] = []
    if answer:
        header, body = _body(answer, "", tokenizer)
        ids += [*header, *body, end_token(answer, asked.followed_by, tokenizer)]
        mask += [answer.loss] * (len(ids) - start)
    return Rendered(ids, mask, start, len(header))


def end_token(answer: Message, followed_by: str | None, tokenizer: ChatGLMTokenizer) -> int:
    """The id that ends the last answer to be learned.

    The role of the message behind it, if the conversation went on. At its end, what the official fine-tuning code puts
    there: `</s>` in ChatGLM3; GLM-4's chat models stop by the role of who speaks next (the later versions of
    finetune_demo/finetune.py), so it is `<|user|>`, and `<|observation|>` behind a tool call.
    """
    if followed_by in _ENDS_AN_ANSWER:
        return tokenizer.convert_tokens_to_ids(f"<|{followed_by}|>")
    if tokenizer.chat_format == "chatglm3":
        return tokenizer.eos_token_id
    calls = answer.arguments is not None or answer.metadata
    return tokenizer.convert_tokens_to_ids("<|observation|>" if calls else "<|user|>")


def written_out(message: Message, chat_format: str) -> Message:
    """The message with its tool definitions or its tool call as text, in the words of the chat format."""
    if message.tools:
        return replace(message, content=_definitions(message.content, message.tools, chat_format), tools=())
    if message.arguments is not None:
        return replace(message, content=_call(message.arguments, chat_format), arguments=None)
    return message


def _body(message: Message, prefix: str, tokenizer: ChatGLMTokenizer) -> tuple[list[int], list[int]]:
    """The line behind the role token and the content, which are encoded apart (build_single_message of both)."""
    message = written_out(message, tokenizer.chat_format)
    return text_ids(tokenizer, f"{message.metadata}\n"), text_ids(tokenizer, prefix + message.content)


def _with_tools_shown(asked: Conversation, chat_format: str) -> Sequence[Message]:
    """The messages, with the tools beside and in them where the chat template of the format shows them."""
    if chat_format == "glm4":
        shown = [Message("system", "", tools=asked.tools)] if asked.tools else []
        for message in asked.messages:
            if message.tools:
                shown.append(Message("system", "", tools=message.tools))
                message = replace(message, tools=())
                if not message.content:
                    continue
            shown.append(message)
        return shown
    if not asked.tools:
        return asked.messages
    tools = tuple(_inner_part(tool) for tool in asked.tools)
    first = asked.messages[0] if asked.messages else None
    if first is not None and first.role == "system":
        return [replace(first, tools=(*first.tools, *tools)), *asked.messages[1:]]
    return [Message("system", _CHATGLM3_INTRODUCTION, tools=tools), *asked.messages]


def _inner_part(tool: Any) -> Any:
    """What is inside OpenAI's `{"type": "function", "function": {...}}`: the family was shown no more of it."""
    function = tool.get("function") if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else tool


def _definitions(content: str, tools: Sequence[Any], chat_format: str) -> str:
    if chat_format == "chatglm3":
        return f"{content}\n{json.dumps(tools, indent=4, ensure_ascii=False)}"
    text = _GLM4_INTRODUCTION
    for tool in map(_inner_part, tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise ValueError("GLM-4's format shows tools that are objects with a 'name'; one of them has none")
        text += f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}{_GLM4_BEHIND_A_TOOL}"
    return text


def _call(arguments: Any, chat_format: str) -> str:
    if isinstance(arguments, str):
        return arguments
    if chat_format == "chatglm3" and all(name.isidentifier() for name in arguments):
        return _CHATGLM3_CALL.format(arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()))
    return json.dumps(arguments, ensure_ascii=False)
