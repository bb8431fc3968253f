"""What the official modeling_chatglm.py of ChatGLM2, ChatGLM3 and GLM-4 offers beside transformers' own interface: as
it was where that is simple, else an error that names what replaces it.

`chat` and `stream_chat` have their own file, `chat_mixin.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchEncoding
from transformers.cache_utils import Cache

from chatglm_ptuning.chat.turn import ChatTurn, GivenHistory
from chatglm_ptuning.prefix.batch import PrefixArgument

if TYPE_CHECKING:
    from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

_QUANTISE = (
    "quantise while the base loads, by load_model(path, quantization_bit=4) of chatglm_ptuning.model.loading or by "
    "from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))"
)
RETIRED_ARGUMENTS = {
    "full_attention_mask": "a 4-D attention_mask, True where a query sees a key, replaces it",
    "return_last_logit": "logits_to_keep=1 replaces it",
    "load_in_8bit": _QUANTISE,
    "load_in_4bit": _QUANTISE,
}
"""Arguments of the official code, or of transformers at its time, with what replaces them."""


def refuse_retired(arguments: Mapping[str, Any]) -> None:
    """Refuses retired arguments, which transformers would ignore or not explain.

    Raises:
        TypeError: naming the argument and what replaces it.
    """
    for name, instead in RETIRED_ARGUMENTS.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            raise TypeError(f"The argument {name} of the official code is not in this kit: {instead}.")


class Retired:
    """A method of the official code that this kit does not have.

    Args:
        instead: what replaces it; a sentence without its end.
    """

    def __init__(self, instead: str) -> None:
        self.instead = instead

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises NotImplementedError, which names the replacement."""
        raise NotImplementedError(f"{self.name} of the official code is not in this kit: {self.instead}.")


class OfficialModelSurface:
    """Arguments and methods of every official model class."""

    quantize = Retired(_QUANTISE)
    get_masks = Retired("the forward pass makes its masks from attention_mask, which covers the tokens")
    get_position_ids = Retired(
        "the forward pass counts the real tokens of attention_mask; position_ids=torch.arange(seq_len)[None] are the "
        "official ones"
    )
    get_prompt = Retired(
        'prefix_batch("default") has the keys and values of the trainable prefix, for the argument prefix of forward '
        "and generate; they never enter a cache"
    )
    process_response = Retired(
        "chat and stream_chat parse answers; tokenizer.chat.parse(ids) gives the messages in generated ids"
    )
    build_stream_inputs = Retired(
        "stream_chat(..., past_key_values=cache, return_past_key_values=True) takes the whole history and computes "
        "only new tokens"
    )

    @property
    def pre_seq_len(self) -> int | None:
        """Length of the trainable prefix, from the configuration."""
        return self.config.pre_seq_len

    @property
    def max_sequence_length(self) -> int:
        """Maximum number of tokens, `seq_length` of the configuration."""
        return self.config.seq_length

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *args: Any,
        device: Any = None,
        empty_init: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, with the arguments of the official constructors.

        Args:
            device: the device to load onto; the same as `device_map={"": device}`.
            empty_init: has no effect: weights that are loaded are never initialised before.

        Raises:
            TypeError: for a retired argument.
            ValueError: if both `device` and `device_map` are given.
        """
        refuse_retired(kwargs)
        if device is not None:
            if kwargs.get("device_map") is not None:
                raise ValueError(
                    f"device={device!r} and device_map={kwargs['device_map']!r} contradict each other: give one."
                )
            kwargs["device_map"] = {"": device}
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def stream_generate(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        return_past_key_values: bool = False,
        prefix: PrefixArgument = None,
        **kwargs: Any,
    ) -> Iterator[torch.LongTensor | tuple[torch.LongTensor, Cache]]:
        """As `generate` by sampling or greedily, and yields `[1, seq_len]`, the prompt's ids and those so far, after
        every token.

        Args:
            input_ids: `[1, seq_len]`, the whole prompt.
            past_key_values, return_past_key_values: as for `stream_chat`.
            prefix, kwargs: as for `generate`.

        Raises:
            ValueError: for several rows, and as `generate`.
        """
        if input_ids.shape[0] != 1:
            raise ValueError(
                f"stream_generate takes one row, got {input_ids.shape[0]}: use generate, which takes a streamer, too."
            )
        for token, cache in self._generate_stream(input_ids, past_key_values, prefix, **kwargs):
            input_ids = torch.cat((input_ids, input_ids.new_tensor([[token]])), dim=1)
            yield (input_ids, cache) if return_past_key_values else input_ids

    def build_inputs(
        self, tokenizer: ChatGLMTokenizer, query: str, history: GivenHistory | None = None
    ) -> BatchEncoding:
        """The inputs of `generate` for a query in the chat format of the base, on the model's device.

        Raises:
            ValueError: if the history has another format.
        """
        ids = ChatTurn(tokenizer.chat, query, history).input_ids()
        return tokenizer([ids], add_special_tokens=False, return_tensors="pt").to(self.device)
