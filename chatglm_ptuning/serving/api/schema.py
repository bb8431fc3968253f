"""The requests: OpenAI's fields, checked. A field that would change the answer and has no effect here is refused."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

_LARGEST_SEED = 2**63 - 1
_MOST_STOPS = 16


def _only(*neutral: Any) -> Any:
    """The type of a field that has no effect here: only values that ask for none are accepted."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
            raise ValueError(f"this server has no {info.field_name}; leave it out")
        return value

    return Annotated[Any, AfterValidator(check)]


class _Strict(BaseModel):
    # A text is no number, and a field that does not exist is an error.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Content = list[TextPart] | str


def text_of(content: Content | None) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class SystemMessage(_Strict):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = Field(None, description="has no effect, as in training")


class UserMessage(_Strict):
    """A question."""

    role: Literal["user"]
    content: Content
    name: str | None = Field(None, description="has no effect, as in training")


class CalledFunction(_Strict):
    """The function of a tool call."""

    name: str = Field(pattern=r"^[^\r\n]{1,200}$")
    arguments: str = Field(description="JSON")


class ToolCall(_Strict):
    """A tool call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class AssistantMessage(_Strict):
    """An earlier answer, also as the API returned it."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = Field(None, description="has no effect, as in training")
    refusal: str | None = None
    annotations: _only([]) = None
    audio: _only() = None
    function_call: _only() = None


class ToolMessage(_Strict):
    """The result of a tool call; `observation` is the family's own name for it."""

    role: Literal["tool", "observation"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = Field(None, description="has no effect, as in training")


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]  # fmt: skip


ROLE_NAMES = ("system", "developer", "user", "assistant", "tool", "observation")


class Tool(_Strict):
    """A tool: a function with `name`, and perhaps `description` and `parameters` (a JSON schema)."""

    type: Literal["function"]
    function: dict[str, Any]

    @field_validator("function")
    @classmethod
    def _check(cls, function: dict[str, Any]) -> dict[str, Any]:
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name.strip() or len(name) > 200 or not name.isprintable():
            raise ValueError("a function needs a name, a text on one line")
        if not isinstance(function.get("description") or "", str):
            raise ValueError("the description of a function must be a text")
        if parameters is not None and not isinstance(parameters, dict):
            raise ValueError("the parameters of a function must be a JSON schema, an object")
        if function.get("strict"):
            raise ValueError("this server cannot force arguments to follow the schema; leave out strict")
        return {key: value for key, value in function.items() if value is not None and key != "strict"}


class StreamOptions(_Strict):
    """Options of `stream`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="has no effect")


class Request(_Strict):
    """What both kinds of completion have.

    `top_k` and `repetition_penalty` are not OpenAI's. The fields without effect are those of OpenAI that change nothing
    in an answer.

    Class attributes:
        prompt_field: the field that becomes the prompt.
    """

    prompt_field: ClassVar[str]

    model: str = Field(description="`base`, or the name of a prefix")
    n: int | None = Field(None, ge=1, description="answers to each prompt")
    max_tokens: int | None = Field(None, ge=1, description="most tokens of an answer")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-_LARGEST_SEED, le=_LARGEST_SEED)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: _only(0, 0.0) = None
    presence_penalty: _only(0, 0.0) = None
    logit_bias: _only({}) = None
    user: str | None = Field(None, description="has no effect")

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > _MOST_STOPS or any(not 0 < len(text) <= 1000 for text in texts):
            raise ValueError(f"at most {_MOST_STOPS} texts, each of 1 to 1000 characters")
        return stop

    @model_validator(mode="after")
    def _check_stream_options(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def choices(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer, as far as the request limits them."""
        return self.max_tokens

    @property
    @abstractmethod
    def shown_logprobs(self) -> int | None:
        """How many most probable tokens are shown at each place; None for no log probabilities."""


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    prompt_field = "messages"

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="most tokens of an answer")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = Field(None, description="a call cannot be forced")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    response_format: _only({"type": "text"}) = None
    modalities: _only(["text"]) = None
    functions: _only([]) = None
    function_call: _only("none", "auto") = None
    reasoning_effort: _only("none") = None
    verbosity: _only("medium") = None
    audio: _only() = None
    moderation: _only() = None
    web_search_options: _only() = None
    metadata: dict[str, Any] | None = Field(None, description="has no effect")
    prediction: Any = Field(None, description="has no effect")
    prompt_cache_key: str | None = Field(None, description="has no effect")
    prompt_cache_options: Any = Field(None, description="has no effect")
    prompt_cache_retention: str | None = Field(None, description="has no effect")
    safety_identifier: str | None = Field(None, description="has no effect")
    service_tier: str | None = Field(None, description="has no effect")
    store: bool | None = Field(None, description="has no effect")

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """See `Request`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def shown_logprobs(self) -> int | None:
        """See `Request`."""
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Request):
    """`POST /v1/completions`: a text is continued, without chat format."""

    prompt_field = "prompt"

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1)] = Field(
        description="a text or token ids, or several of them"
    )
    logprobs: int | None = Field(None, ge=0, le=5, description="most probable tokens shown at each place")
    echo: bool | None = Field(None, description="begin each text with its prompt")
    best_of: _only(1) = None
    suffix: _only("") = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("this server has no log probabilities of the prompt: use echo or logprobs, not both")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    @property
    def choices(self) -> int:
        """See `Request`."""
        return len(self.prompts) * (self.n or 1)

    @property
    def shown_logprobs(self) -> int | None:
        """See `Request`."""
        return self.logprobs


class PrefixRequest(_Strict):
    """`POST /v1/prefixes`."""

    name: str = Field(description="the name of its folder", max_length=255)
