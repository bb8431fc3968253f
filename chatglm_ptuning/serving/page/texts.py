"""What the page says, in Chinese and English."""

from __future__ import annotations

from chatglm_ptuning.serving.engine.request import QueueFull, UnknownPrefix
from chatglm_ptuning.serving.page.talk import Answer, MessageTooLong

LANGUAGES = {"zh": "中文", "en": "English"}

_TEXTS = {
    "zh": {
        "title": "{base} · P-Tuning v2",
        "no_prefix": "{folder} 中还没有前缀，现在由原模型回答：运行 `bash scripts/train.sh` "
        "训练一个，它会自动出现在这里。",
        "model": "回答者",
        "other": "对比",
        "plain_base": "原模型（无前缀）",
        "no_other": "不对比",
        "empty": "在下面输入一条消息。",
        "message": "消息（Shift+Enter 换行）",
        "send": "发送",
        "stop": "停止",
        "again": "重新生成",
        "clear": "清空",
        "export": "导出",
        "settings": "设置",
        "system": "系统提示",
        "history": "记住前面的对话（只学过单轮任务的前缀宜关闭）",
        "temperature": "温度（0：总取最可能的词）",
        "top_p": "top-p",
        "length": "回答最多的 token 数",
        "speed": "{tokens} 个 token，{speed} token/s",
        "limit": "已到长度上限",
        "cancelled": "已停止",
        "no_text": "空回答",
        "left_out": "最早的 {count} 轮对话放不下，未发给模型",
        "MessageTooLong": "消息太长：有 {tokens} 个 token，而除回答外只放得下 {room} 个；请缩短消息，或减小回答长度。",
        "QueueFull": "排队的请求太多，请在 {seconds} 秒后点“重新生成”。",
        "UnknownPrefix": "前缀 {prefix} 已不存在或无法加载，请另选一个。",
        "other_error": "没有得到完整的回答：{error}",
    },
    "en": {
        "title": "{base} · P-Tuning v2",
        "no_prefix": "There is no prefix in {folder} yet, so the plain base answers: run `bash scripts/train.sh` to "
        "train one, and it appears here by itself.",
        "model": "Answers",
        "other": "Compare with",
        "plain_base": "plain base (no prefix)",
        "no_other": "nothing",
        "empty": "Write a message below.",
        "message": "Message (Shift+Enter: new line)",
        "send": "Send",
        "stop": "Stop",
        "again": "Regenerate",
        "clear": "Clear",
        "export": "Export",
        "settings": "Settings",
        "system": "System prompt",
        "history": "Remember the turns before (switch off for a prefix that has learned single turns)",
        "temperature": "Temperature (0: always the most probable token)",
        "top_p": "Top-p",
        "length": "Most tokens of an answer",
        "speed": "{tokens} tokens, {speed} tokens/s",
        "limit": "length limit reached",
        "cancelled": "stopped",
        "no_text": "empty answer",
        "left_out": "the first {count} turns did not fit and were not sent",
        "MessageTooLong": "The message is too long: it has {tokens} tokens, and there is room for {room} beside the "
        "answer. Shorten it, or allow fewer tokens for the answer.",
        "QueueFull": "Too many requests are waiting. Press Regenerate in {seconds} s.",
        "UnknownPrefix": "The prefix {prefix} was removed or cannot be loaded. Choose another one.",
        "other_error": "There is no complete answer: {error}",
    },
}

_SHOWN_ENDS = {"length": "limit", "cancelled": "cancelled"}


def text(language: str, name: str, **values: object) -> str:
    """A text of the page."""
    return _TEXTS[language][name].format(**values)


def language_of(accepted: str) -> str:
    """The language for a browser, from its header Accept-Language: Chinese if that is the first."""
    return "zh" if accepted.strip().lower().startswith("zh") else "en"


def name_of(language: str, prefix: str | None) -> str:
    """What a model is called."""
    return text(language, "plain_base") if prefix is None else prefix


def note(language: str, answer: Answer) -> str:
    """The line about an answer: who gave it, its length, its speed, and how it ended if not by itself."""
    parts = [name_of(language, answer.prefix)]
    if (speed := answer.tokens_per_second) is not None:
        parts.append(text(language, "speed", tokens=answer.tokens, speed=f"{speed:.1f}"))
    if answer.finish_reason in _SHOWN_ENDS:
        parts.append(text(language, _SHOWN_ENDS[answer.finish_reason]))
    if answer.finish_reason == "stop" and not answer.text:
        parts.append(text(language, "no_text"))
    if answer.left_out and answer.error is None:
        parts.append(text(language, "left_out", count=answer.left_out))
    return " · ".join(parts)


def problem(language: str, answer: Answer) -> str | None:
    """Why there is no answer, or only a part of one, in one sentence; None if there is nothing to say."""
    error = answer.error
    if error is None:
        return None
    if isinstance(error, MessageTooLong):
        return text(language, "MessageTooLong", tokens=error.tokens, room=error.room)
    if isinstance(error, QueueFull):
        return text(language, "QueueFull", seconds=error.retry_after)
    if isinstance(error, UnknownPrefix):
        return text(language, "UnknownPrefix", prefix=answer.prefix)
    return text(language, "other_error", error=error)
