"""The ChatGLM family as a model of lm-evaluation-harness, with its start tokens, chat formats and prefixes.

Importing the module needs lm_eval, and registers the class there as `chatglm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.batch import PrefixArgument


@register_model("chatglm")
class ChatGLMHarnessModel(HFLM):
    """lm-eval's HFLM, adapted to this family.

    - Every context starts with `[gMASK] sop` exactly once, also an empty or truncated one and each window of a long
      text. (HFLM would add no start: this family's `<s>` decodes to an empty text, with which every text begins.)
    - Long contexts are truncated behind the start; `cut_contexts` counts them.
    - The chat format encodes a chat as ids, because text cannot spell special tokens. Candidates are at the position
      of an answer in training.
    - Log-softmax is computed in float32, for the scored positions only.

    Args:
        pretrained: a loaded base, or a folder or hub name to load.
        tokenizer: of a loaded base.
        ptuning_checkpoint: a prefix to load and select.
        prefix: of every request, as for a forward pass; by default the selected one.
        batch_size: requests per batch.
        device: is ignored; lm-eval passes it, but the base is not moved.
        load_options: further arguments of `load_model`, for a base to load.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `load_model` and `load_prefix`; on an untrained prefix.
    """

    def __init__(
        self,
        pretrained: ChatGLMForConditionalGeneration | str,
        tokenizer: ChatGLMTokenizer | None = None,
        ptuning_checkpoint: str | None = None,
        prefix: PrefixArgument = None,
        batch_size: int | str = 8,
        max_batch_size: int = 64,
        device: str | None = None,
        **load_options: Any,
    ) -> None:
        if isinstance(pretrained, str):
            source = {name: load_options[name] for name in ("hub", "revision") if name in load_options}
            tokenizer = tokenizer or load_tokenizer(pretrained, **source)
            pretrained = load_model(pretrained, **load_options)
        if ptuning_checkpoint is not None:
            pretrained.load_prefix(ptuning_checkpoint)
        pretrained.check_prefix_is_trained(prefix)
        super().__init__(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            softmax_dtype="float32",
        )
        self.prefix = prefix
        self.cut_contexts = 0
        self._chats: dict[str, tuple[list[dict[str, str]], list[int]]] = {}
        self._without_start = False
        self._longest_continuation: int | None = None

    # Text to ids

    @property
    def prefix_token_id(self) -> int:
        """The last start token, which lm-eval uses as an empty context."""
        return self.tokenizer.start_ids[-1]

    @property
    def max_length(self) -> int:
        """`seq_length` of the base, which does not count the prefix."""
        room = len(self.tokenizer.start_ids) if self._without_start else 0
        return self.model.config.seq_length - room

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, or of a chat that `apply_chat_template` rendered; with the start tokens by default."""
        if string in self._chats:
            ids = self._chats[string][1]
        else:
            with_start = not self._without_start if add_special_tokens is None else add_special_tokens
            ids = self.tokenizer.encode(string, add_special_tokens=with_start)
        return ids if left_truncate_len is None else self._fit(ids, left_truncate_len)

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids and mask, each `[batch, seq_len]`."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of ids; the end token by its name, because an empty text would stop every generation."""
        if tokens == self.eot_token_id:
            return self.tokenizer.eos_token
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; its ids are kept, because encoding that text would not give its special tokens.

        Raises:
            ValueError: if the base has no chat format, or two chats with different ids have the same text.
        """
        if self.tokenizer.chat_format == "base":
            raise ValueError(
                f"{self.tokenizer.name_or_path} is a base without a chat format: leave apply_chat_template out."
            )
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        ids = self._chat_ids(chat_history, add_generation_prompt)
        if self._chats.setdefault(text, (chat_history, ids))[1] != ids:
            raise ValueError(f"Two chats have the same text, as one of them spells special tokens: {text[-200:]!r}.")
        return text

    def _chat_ids(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        """The ids up to the text of the answer, or with the beginning of an answer, without the id that ends it."""
        chat = self.tokenizer.chat
        conversation = Conversation([Message.from_dict(message) for message in messages])
        if add_generation_prompt:
            return [*chat.encode_prompt(conversation), *chat.answer_header()]
        return chat.encode(conversation).input_ids[:-1]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context not in self._chats:
            return super()._encode_pair(context, continuation)
        messages, ids = self._chats[context]
        if messages[-1]["role"] != "assistant":
            return list(ids), self.tokenizer.encode(continuation, add_special_tokens=False)
        begun = {**messages[-1], "content": messages[-1]["content"] + continuation}
        return list(ids), self._chat_ids([*messages[:-1], begun], False)[len(ids) :]

    def _fit(self, ids: Sequence[int], room: int) -> list[int]:
        """The ids behind exactly one start, truncated from the left if there is no room for them."""
        start = self.tokenizer.start_ids
        ids = list(ids)
        if ids[: len(start)] == start:
            ids = ids[len(start) :]
        elif ids[:1] == start[-1:]:
            ids = ids[1:]
        surplus = len(start) + len(ids) - room
        if surplus > 0:
            self.cut_contexts += 1
            ids = ids[surplus:]
        return [*start, *ids]

    # Computation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of texts, in windows that leave room for the start tokens."""
        with self._start_tokens_apart(True):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    @contextmanager
    def _start_tokens_apart(self, apart: bool) -> Iterator[None]:
        before, self._without_start = self._without_start, apart
        try:
            yield
        finally:
            self._without_start = before

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        start = len(self.tokenizer.start_ids)
        with self._start_tokens_apart(False):
            fitted = []
            for texts, context, continuation in requests:
                room = self.max_length + 1 - len(continuation)
                if room < start:
                    raise ValueError(
                        f"A continuation of {len(continuation)} tokens does not fit into the {self.max_length} of the "
                        f"base behind the start tokens: {texts!r:.200}"
                    )
                fitted.append((texts, self._fit(context, room), continuation))
            self._longest_continuation = max((len(continuation) for *_, continuation in fitted), default=None)
            try:
                return super()._loglikelihood_tokens(fitted, disable_tqdm, **kwargs)
            finally:
                self._longest_continuation = None

    def _model_call(self, inps: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits of the last positions, as many as are scored: lm-eval counts them from the end.

        Rows are padded with zeros on the right, so neither mask nor positions of the tokens change.
        """
        keep = 0
        if self._longest_continuation is not None:
            padded = int((inps != 0).flip(-1).int().argmax(-1).max())
            keep = min(padded + self._longest_continuation, inps.shape[1])
        with torch.no_grad():
            return self.model(inps, logits_to_keep=keep, use_cache=False, prefix=self.prefix).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        settings.setdefault("eos_token_id", self.tokenizer.chat.stop_ids)
        return super()._model_generate(context, max_length, stop, prefix=self.prefix, **settings)
