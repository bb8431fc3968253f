"""The tokenizer of the family for transformers; text never becomes a special token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy, logging

from chatglm_ptuning.chat.format import ChatFormat
from chatglm_ptuning.chat.formats import formats_of
from chatglm_ptuning.files import check_json_files
from chatglm_ptuning.model.chat_recognition import FolderSettings, recognise_chat_format
from chatglm_ptuning.model.official_tokenizer import OfficialTokenizerSurface
from chatglm_ptuning.model.render_guard import RenderGuard
from chatglm_ptuning.model.vocabulary import open_vocabulary

logger = logging.get_logger(__name__)

# Fields in official folders and of earlier versions of transformers that have no effect here.
_UNUSED_SETTINGS = ("auto_map", "do_lower_case", "remove_space", "additional_special_tokens",
                    "extra_special_tokens", "is_local", "local_files_only", "model_specific_special_tokens",
                    "image_size")  # fmt: skip


class ChatGLMTokenizer(OfficialTokenizerSurface, PreTrainedTokenizer):
    """Tokenizer of the whole family, with the official ids: ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2-6B and chatglm-nano
    (sentencepiece), GLM-4-9B and CodeGeeX4-ALL-9B (byte pairs).

    Every sequence starts with `[gMASK] sop` (`[gMASK] <sop>`); a pair ends with eos: `</s>` or `<|endoftext|>`. Padding
    is `<unk>` or `<|endoftext|>`, on the left, with position ids 0 on it and 0, 1, 2, ... on the tokens. As in the
    official tokenizer, sentencepiece writes spaces as U+2581, so that a U+2581 in the text is decoded to a space.

    A special token comes from its id or from a chat template, not from text: "<|user|>" is text of eight characters.
    `encode_special_tokens` turns this off, for prompts that you have rendered as text. Start tokens that such a text
    spells are not added a second time. Contents of messages are always text.

    Args:
        vocab_file: the `tokenizer.model`.
        tokenizer_file: a `tokenizer.json` with GLM-4's vocabulary, used if there is no `tokenizer.model`.
        chat_format: the name of one of `CHAT_FORMATS`; by default it is recognised by the files beside the vocabulary
            (`recognise_chat_format`).
        chat_template: a jinja template to use instead of the format's own.
        special_token_ids: special tokens to ids of a GLM-4 vocabulary, as `save_pretrained` writes them.
        added_tokens_decoder: the same in the format of the official files.
        encode_special_tokens: whether special tokens that a text spells become special tokens (`Vocabulary.parts`);
            an attribute, too, and an argument of each call. As in the official tokenizer, it is saved.
        kwargs: settings of transformers' tokenizers (`padding_side`, `model_max_length`, ...).

    Raises:
        ValueError: if the vocabulary is missing, damaged or of another family, or does not support the chat format.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *inputs: Any, **kwargs: Any
    ) -> ChatGLMTokenizer:
        """As in transformers.

        Raises:
            ValueError: as the class, and naming a settings file that is damaged.
        """
        check_settings(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    def __init__(
        self,
        vocab_file: str | None,
        tokenizer_file: str | None = None,
        chat_format: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        special_token_ids: Mapping[str, int] | None = None,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        origin = str(kwargs.get("name_or_path", ""))
        if isinstance(chat_template, str):
            chat_template = chat_template.removeprefix("\ufeff")  # some editors begin chat_template.jinja with it
        special_ids = special_token_ids or {str(token): int(i) for i, token in (added_tokens_decoder or {}).items()}
        self.vocabulary = open_vocabulary(
            vocab_file or tokenizer_file or Path(origin, self.vocab_files_names["vocab_file"]), special_ids
        )
        for name in _UNUSED_SETTINGS:
            kwargs.pop(name, None)
        folder = self.vocabulary.path.parent
        beside = FolderSettings(folder)
        chat_format = chat_format or beside.chat_format
        if chat_format is None:
            template = chat_template or next(iter(beside.templates), None)
            chat_format = recognise_chat_format(self.vocabulary, template, [origin, str(folder)], beside.names)
        self._chat = self._format_called(chat_format)
        # The caller's template is used, and one that was saved with this format. The template of an official folder is
        # replaced by ours, which also marks where the text is encoded in two parts.
        if chat_template in beside.templates and beside.chat_format != chat_format:
            chat_template = None
        if special_ids:
            kwargs["special_token_ids"] = self.vocabulary.special_ids
        self.encode_special_tokens = encode_special_tokens
        super().__init__(
            chat_format=chat_format,
            encode_special_tokens=encode_special_tokens,
            chat_template=chat_template or self._chat.chat_template,
            extra_special_tokens=list(self.vocabulary.special_ids),
            **self._named_tokens(kwargs),
            **kwargs,
        )

    def _named_tokens(self, kwargs: dict[str, Any]) -> dict[str, str | AddedToken]:
        tokens: dict[str, str | AddedToken] = dict(self.vocabulary.named_tokens)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            given = kwargs.pop(name, None)
            if given is not None and str(given) in self.vocabulary:
                tokens[name] = given
            elif given is not None:
                logger.warning(f"{name} {str(given)!r} is not in {self.vocabulary.path}; {tokens.get(name)!r} is used.")
        return tokens

    # Chat format

    @property
    def chat_format(self) -> str:
        """The name of the chat format: `chatglm2`, `chatglm3`, `glm4` or `base` (plain text).

        Setting it sets the chat template.
        """
        return self._chat.name

    @chat_format.setter
    def chat_format(self, chat_format: str) -> None:
        self._chat = self._format_called(chat_format)
        self.chat_template = self._chat.chat_template

    @property
    def chat(self) -> ChatFormat:
        """The chat format, which encodes conversations and decodes answers."""
        return self._chat

    def _format_called(self, chat_format: str) -> ChatFormat:
        allowed = formats_of(self.vocabulary)
        if chat_format not in allowed:
            raise ValueError(
                f"chat_format must be one of {', '.join(sorted(allowed))} with the vocabulary in "
                f"{self.vocabulary.path}, got {chat_format!r}."
            )
        return allowed[chat_format](self.vocabulary)

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included, as in the official tokenizer."""
        return len(self.vocabulary)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """Tokens to ids; a special token replaces a piece that is spelled like it."""
        tokens = ((self.vocabulary.token(index), index) for index in range(len(self.vocabulary)))
        return {token: index for token, index in tokens if token}

    @property
    def start_ids(self) -> list[int]:
        """The two ids with which every sequence starts, `[gMASK]` and `sop`."""
        return list(self._chat.start_ids)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        # transformers would search all text for added tokens, and so turn a user's text into special tokens.
        unknown = [str(token) for token in new_tokens if str(token) not in self.vocabulary]
        if unknown:
            raise ValueError(
                f"Cannot add {', '.join(map(repr, unknown))}: the vocabulary is fixed by "
                f"{self.vocabulary.path}. Spell new markers as ordinary text."
            )
        return 0

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> int:
        """As in transformers, for tokens of the vocabulary.

        Raises:
            ValueError: naming others; the tokenizer is then unchanged.
        """
        for given in special_tokens_dict.values():
            self._add_tokens([given] if isinstance(given, (str, AddedToken)) else given)
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.vocabulary.id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.vocabulary.token(index)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes `tokenizer.model` into a folder, also for a vocabulary from a tokenizer.json; returns its path."""
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        content = self.vocabulary.content()
        if not target.is_file() or target.read_bytes() != content:  # it may be the file that is still being read from
            target.write_bytes(content)
        return (str(target),)

    # Text to ids

    def tokenize(self, text: str, encode_special_tokens: bool | None = None, **kwargs: Any) -> list[str]:
        """The pieces of a text. For ids call the tokenizer: a piece may be spelled like a special token, and
        `convert_tokens_to_ids` then returns the id of that.
        """
        parts = self._parts(text, encode_special_tokens)
        return [piece for part, special in parts for piece in ([part] if special else self.vocabulary.split(part))]

    def _parts(self, text: str, encode_special_tokens: bool | None) -> Iterable[tuple[str, bool]]:
        """Parts of the text, each with whether it is a special token."""
        if self.encode_special_tokens if encode_special_tokens is None else encode_special_tokens:
            return self.vocabulary.parts(text)
        if self.vocabulary.spells_special_tokens(text):
            logger.warning_once(
                "A text spells special tokens, such as <|user|> or [gMASK]: they are encoded as ordinary text, so that "
                "a text cannot set roles. For a prompt that you have rendered, use encode_special_tokens=True, in the "
                "call or in from_pretrained. apply_chat_template and build_chat_input make the ids of messages."
            )
        return [(text, False)]

    def _ids_of(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        encode, special_id = self.vocabulary.encode, self.vocabulary.id
        return [index for part, special in parts for index in ([special_id(part)] if special else encode(part))]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop A`, or `[gMASK] sop A B </s>` for a pair."""
        ids = [*self.start_ids, *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for a special token, else 0, for the sequence of `build_inputs_with_special_tokens`."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        mask = [1, 1] + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        is_split_into_words: bool = False,
        return_offsets_mapping: bool = False,
        encode_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        # transformers' own version goes from text to token strings to ids, which turns a piece that is spelled like a
        # special token into one. This one goes from text to ids.
        kwargs["truncation"] = truncation_strategy.value
        is_batch = _is_batch(text, is_split_into_words)
        if not is_batch:
            rows = [(text, text_pair)]
        elif text_pair is None:
            rows = [row if _is_pair(row, is_split_into_words) else (row, None) for row in text]
        elif isinstance(text_pair, (list, tuple)) and len(text_pair) == len(text):
            rows = list(zip(text, text_pair, strict=True))
        else:
            raise ValueError(f"text is a batch of {len(text)}, so text_pair must be a batch of the same size.")
        # Rows are padded once all of them are known.
        names = ("pad_to_multiple_of", "padding_side", "return_attention_mask", "return_tensors")
        for_batch = {name: kwargs.pop(name, None) for name in names}
        columns: dict[str, list] = {}
        how = (is_split_into_words, encode_special_tokens)
        for first, second in rows:
            ids = self._to_ids(first, *how)
            # Start tokens that a rendered prompt spells are added below.
            spelled = isinstance(first, str) and kwargs.get("add_special_tokens", True)
            start = len(self.start_ids) if spelled and ids[: len(self.start_ids)] == self.start_ids else 0
            encoded = self.prepare_for_model(
                ids[start:],
                None if second is None else self._to_ids(second, *how),
                return_attention_mask=False,
                **kwargs,
            )
            if return_offsets_mapping:
                spans = self._to_offsets(first, *how)[start:]
                pair = None if second is None else self._to_offsets(second, *how)
                encoded["offset_mapping"] = self._row_offsets(spans, pair, kwargs)
            for name, value in encoded.items():
                columns.setdefault(name, []).append(value)
        if is_batch and for_batch["return_tensors"]:
            # Rows of different lengths do not fit into a tensor.
            columns.pop("overflowing_tokens", None)
            columns.pop("num_truncated_tokens", None)
        max_length = kwargs.get("max_length")
        batch = self.pad(columns, padding=padding_strategy.value, max_length=max_length, **for_batch)
        if is_batch or for_batch["return_tensors"]:
            return batch
        return BatchEncoding({name: column[0] for name, column in batch.items()})

    def _row_offsets(
        self, first: list[tuple[int, int]], second: list[tuple[int, int]] | None, kwargs: Mapping[str, Any]
    ) -> list[tuple[int, int]]:
        """Offsets of a row's ids after truncation; (0, 0) for a token that was added, as in transformers."""
        spans, middle = [*first, *(second or ())], len(first)
        # Negative ids are placeholders that track tokens through truncation and the insertion of special tokens.
        placeholders = [-1 - place for place in range(len(spans))]
        settings = {name: kwargs[name] for name in ("truncation", "max_length", "add_special_tokens") if name in kwargs}
        row = self.prepare_for_model(
            placeholders[:middle], None if second is None else placeholders[middle:], **settings
        )
        return [(0, 0) if index >= 0 else spans[-1 - index] for index in row["input_ids"]]

    def _to_offsets(
        self, text: Any, is_split_into_words: bool, encode_special_tokens: bool | None
    ) -> list[tuple[int, int]]:
        if isinstance(text, str):
            spans, start = [], 0
            for part, special in self._parts(text, encode_special_tokens):
                inside = [(0, len(part))] if special else self.vocabulary.offsets(part)
                spans += [(start + begin, start + end) for begin, end in inside]
                start += len(part)
            return spans
        if is_split_into_words and all(isinstance(word, str) for word in text):
            return [span for word in text for span in self._to_offsets(word, False, encode_special_tokens)]
        raise ValueError(f"return_offsets_mapping needs texts; {text!r} has no characters.")

    def _to_ids(self, text: Any, is_split_into_words: bool, encode_special_tokens: bool | None) -> list[int]:
        if isinstance(text, str):
            return self._ids_of(self._parts(text, encode_special_tokens))
        if isinstance(text, (list, tuple)) and all(isinstance(item, int) for item in text):
            return list(text)
        if is_split_into_words and isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text):
            return [index for word in text for index in self._ids_of(self._parts(word, encode_special_tokens))]
        raise ValueError(f"A text is a string, a list of ids, or, split into words, a list of strings; got {text!r}.")

    def _pad(self, encoded_inputs: Any, *args: Any, padding_side: str | None = None, **kwargs: Any) -> Any:
        ids = encoded_inputs["input_ids"]
        before = len(ids)
        positions = encoded_inputs.get("position_ids")
        if positions is None:
            positions = _positions(encoded_inputs.get("attention_mask") or [1] * before)
        encoded_inputs = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        added = len(encoded_inputs["input_ids"]) - before
        columns = {}
        if "position_ids" in self.model_input_names:
            columns["position_ids"] = (positions, 0)
        if "offset_mapping" in encoded_inputs:
            columns["offset_mapping"] = (encoded_inputs["offset_mapping"], (0, 0))
        on_left = (padding_side or self.padding_side) == "left"
        for name, (values, value) in columns.items():
            encoded_inputs[name] = [value] * added + values if on_left else values + [value] * added
        return encoded_inputs

    # Ids to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces and special tokens."""
        return self.vocabulary.join(tokens)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text = self.vocabulary.decode(ids, skip_special_tokens)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    # Chats

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders one chat or a batch of chats, to ids (those of `build_chat_input` or `build_prompt`) or to text.

        Arguments and results are those of transformers, with two differences. Special tokens that messages and tools
        spell are always ordinary text in the ids, for any `sanitize_control_tokens`. (The text of `tokenize=False`
        cannot distinguish them. Encoding it needs `encode_special_tokens`, and then a message can set roles.) And
        `return_assistant_tokens_mask` is not supported.

        Raises:
            ValueError: for `return_assistant_tokens_mask`, and for contradicting arguments.
            TypeError: for messages or tools that are not of JSON's types.
            jinja2.TemplateError: for a role that the format does not have, or a message without text.
        """
        if return_assistant_tokens_mask:
            raise ValueError("ChatGLMTokenizer does not support return_assistant_tokens_mask.")
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tokenize": False,
        }
        if not tokenize:
            return super().apply_chat_template(conversation, tools=tools, documents=documents, **options, **kwargs)
        guard = RenderGuard(self.vocabulary)
        rendered = super().apply_chat_template(
            guard.protect(conversation),
            tools=guard.protect(tools),
            documents=guard.protect(documents),
            segment_cut=guard.segment_cut,
            **options,
            **guard.protect(kwargs),
        )
        texts = [rendered] if isinstance(rendered, str) else rendered
        rows = [self._ids_of(guard.parts(text)) for text in texts]
        encoded = self(
            rows[0] if isinstance(rendered, str) else rows,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return encoded if return_dict else encoded["input_ids"]


class ChatGLM4Tokenizer(ChatGLMTokenizer):
    """The same by the class name in GLM-4's official tokenizer_config.json, for AutoTokenizer."""


def check_settings(path: str | PathLike[str]) -> None:
    """Checks the settings files in the folder of a tokenizer; does nothing for a hub name.

    Raises:
        ValueError: naming a damaged one.
    """
    check_json_files(Path(path), "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def _is_batch(text: Any, is_split_into_words: bool) -> bool:
    if not isinstance(text, (list, tuple)):
        return False
    if not text:
        return not is_split_into_words
    return isinstance(text[0], (list, tuple) if is_split_into_words else (str, list, tuple))


def _is_pair(row: Any, is_split_into_words: bool) -> bool:
    # Two words are one row; two lists of words, or two texts, are a pair.
    kinds = (list, tuple) if is_split_into_words else (str, list, tuple)
    return isinstance(row, (list, tuple)) and len(row) == 2 and all(isinstance(part, kinds) for part in row)


def _positions(attention_mask: Sequence[int]) -> list[int]:
    positions, position = [], 0
    for is_real in attention_mask:
        positions.append(position if is_real else 0)
        position += bool(is_real)
    return positions
