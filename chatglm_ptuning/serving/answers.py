"""Answers from the tokens of a running generation: text piece by piece, tool calls, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chatglm_ptuning.chat.format import ChatFormat, Vocabulary
from chatglm_ptuning.chat.message import Message

_NO_CHARACTER = "\ufffd"
_CONTEXT = 8
"""Ids of the prompt that decide how the first ids of its continuation are decoded."""


class TextStream:
    """The text of ids that arrive one by one, equal to `Vocabulary.decode` of them all.

    Only the last ids are decoded again for each new one.

    Args:
        context: ids before the text. Without any, a space at its beginning is dropped, as `decode` does.

    Attributes:
        settled: the text that more ids do not change.
    """

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int] = ()) -> None:
        self.settled = ""
        self._vocabulary = vocabulary
        self._window = list(context[-_CONTEXT:])
        self._known = len(self._window)
        # A character that is incomplete at the end of the context belongs to the text.
        self._before = self._decoded().rstrip(_NO_CHARACTER)
        self._unsettled = ""

    @property
    def text(self) -> str:
        """The text so far; bytes of an incomplete character are U+FFFD."""
        return self.settled + self._unsettled

    def add(self, token_id: int) -> None:
        """Appends an id."""
        self._window.append(token_id)
        decoded = self._decoded()
        piece = decoded[len(self._before) :]
        if piece.endswith(_NO_CHARACTER):
            self._unsettled = piece
            return
        self.settled, self._unsettled = self.settled + piece, ""
        if piece.strip():
            # Spaces alone would be dropped at the beginning of a window.
            self._window = self._window[self._known :]
            self._known = len(self._window)
            decoded = self._decoded()
        else:
            self._known = len(self._window)
        self._before = decoded

    def _decoded(self) -> str:
        return self._vocabulary.decode(self._window, skip_special_tokens=True)


class AnswerReader:
    """Reads an answer while it is generated. Its pieces of text together are the text of the whole answer.

    A piece never ends within a character, a placeholder, or what may become a stop string or the name of a tool.

    Args:
        stop: the answer ends before the first of these texts; they are looked for in its text, not in tool calls.
        tool_names: names of the tools that the model may call. A message with another name is text. Without tools,
            no text is held back for a name.
        context: ids of the prompt, if the answer continues its text without a separation.
        show_calls: whether tool calls belong to the text, each as the name of its tool and, on the next line, the call.

    Attributes:
        text: the text returned so far: the messages that belong to it, one under the other.
        messages: the messages so far, as `ChatFormat.parse` gives them.
        stopped: whether a stop string was found; more ids then change nothing.
        settled: length of the text with what is held back, without an incomplete character.
        has_text: whether there is any text, perhaps incomplete.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        stop: Sequence[str] = (),
        tool_names: Sequence[str] = (),
        context: Sequence[int] = (),
        show_calls: bool = False,
    ) -> None:
        self.text = ""
        self.messages = [Message("assistant", "")]
        self.stopped = False
        self.settled = 0
        self.has_text = False
        self._format = chat_format
        self._stop = [text for text in stop if text]
        self._tool_names, self._show_calls = tool_names, show_calls
        self._streams = [TextStream(chat_format.vocabulary, context)]

    @property
    def calls(self) -> list[Message]:
        """The messages that are calls of one of the tools."""
        return [message for message in self.messages if self._is_call(message)]

    def add(self, token_id: int) -> str:
        """Appends an id, and returns the next piece of text, which may be empty."""
        if self.stopped:
            return ""
        if token_id == self._format.next_message_id:
            self._streams.append(TextStream(self._format.vocabulary))
        else:
            self._streams[-1].add(token_id)
        return self._next_piece(ended=False)

    def finish(self) -> str:
        """The rest of the text, after the last id."""
        return "" if self.stopped else self._next_piece(ended=True)

    def _next_piece(self, ended: bool) -> str:
        texts = [stream.text for stream in self._streams]
        self.messages, unfinished = self._format.parse_texts(texts, self._tool_names)
        last = self.messages[-1]
        earlier = [self._format.text_of(message) for message in self.messages[:-1] if not self._is_hidden(message)]
        if self._is_hidden(last):
            visible = "\n".join(earlier)
            self.settled = len(visible)
        else:
            # The format strips the content; a stop string may begin with the space at its end.
            content, raw = last.content, texts[-1]
            spaces = raw[len(raw.rstrip()) :]
            searched = content if not content or content.endswith(spaces) else content + spaces
            whole = "\n".join([*earlier, self._format.text_of(replace(last, content=searched))])
            self.has_text = bool(whole)
            self.settled = len(whole.rstrip(_NO_CHARACTER))
            if unfinished and not ended:
                return ""
            end = self._end_of(searched)
            if self.stopped:
                last = self.messages[-1] = replace(last, content=searched[:end])
            shown = replace(last, content=last.content if ended else last.content[:end])
            visible = "\n".join([*earlier, self._format.text_of(shown)])
        piece = visible[len(self.text) :]
        self.text += piece
        return piece

    def _end_of(self, text: str) -> int:
        """Where the text ends: before a stop string, or before what may become one."""
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return min(found)
        held = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return len(text) - max(held, default=0)

    def _is_hidden(self, message: Message) -> bool:
        return not self._show_calls and self._is_call(message)

    def _is_call(self, message: Message) -> bool:
        return message.metadata in self._tool_names
