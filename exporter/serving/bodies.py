"""What OpenAI's two completion APIs take, as pydantic models: an unknown key, a wrong type or value is an error."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from exporter.runtime.sampling import Sampling
from exporter.serving.failures import Failure, wrong_body

LARGEST_N = 128
MOST_STOPS = 4
INT64 = 1 << 63

StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=INT64)]


class Body(BaseModel):
    # strict: "5" is no number and 1 no truth value.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Generation(Body):
    """What both APIs share. Each description completes the sentence "NAME has to be ..."."""

    model: str = Field(description="the name of a model, see /v1/models")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object such as {'include_usage': true}")
    n: int | None = Field(None, ge=1, le=LARGEST_N, description=f"a whole number from 1 to {LARGEST_N}")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 (greedy) to 2")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0, at most 1")
    stop: StopString | list[StopString] | None = Field(
        None, description=f"a string, or a list of at most {MOST_STOPS} strings, none empty or above 1000 characters"
    )
    seed: int | None = Field(None, ge=-INT64, lt=INT64, description="a whole number of 64 bits")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="a number from -2 to 2")
    user: str | None = Field(None, max_length=1000, description="a string of at most 1000 characters")
    # Not in OpenAI's API, but in other servers' under these names.
    top_k: int | None = Field(None, ge=0, lt=INT64, description="a whole number, 0 (all tokens) or more")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="a number from 0.01 to 100")
    ignore_eos: bool | None = Field(None, description="true or false")
    # OpenAI's, and nothing that this server can do. They may be null.
    logit_bias: None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, seed: int) -> Sampling:
        """OpenAI's defaults: temperature 1, everything else off."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if isinstance(self.stop, list) and len(self.stop) > MOST_STOPS:
            raise Failure(400, f"stop has to be {expectation(self, 'stop')}", "invalid_value", "stop")
        if self.stream_options is not None and not self.stream:
            raise Failure(400, "stream_options goes with stream: true", "invalid_value", "stream_options")
        return self


class CompletionBody(Generation):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(
        description="a string, a list of strings, a list of token ids, or a list of such lists; none of them empty"
    )
    max_tokens: int | None = Field(None, ge=0, lt=INT64, description="a whole number, 0 or more")
    logprobs: int | None = Field(None, ge=0, le=5, description="a whole number from 0 to 5")
    echo: bool | None = Field(None, description="true or false")
    best_of: None = None
    suffix: None = None

    @model_validator(mode="after")
    def _something_to_compute(self) -> Self:
        if self.max_tokens == 0 and not (self.echo and self.logprobs is not None):
            raise Failure(400, "max_tokens 0 goes with echo and logprobs", "invalid_value", "max_tokens")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    input: str | None = None  # of templates such as alpaca
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None

    def for_template(self) -> dict[str, Any]:
        """The keys that were given; several parts of text are lines."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        optional = {"input": self.input, "name": self.name}
        return {"role": self.role, "content": content} | {key: text for key, text in optional.items() if text}


Messages = Annotated[list[Message], Field(min_length=1, description="a list of at least one message")]


class ChatBody(Generation):
    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=INT64, description="a whole number, 1 or more")
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64, description="a whole number, 1 or more")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="a whole number from 0 to 20")
    tools: None = None
    tool_choice: None = None
    parallel_tool_calls: None = None
    functions: None = None
    function_call: None = None
    response_format: None = None
    modalities: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    store: None = None
    metadata: None = None
    service_tier: None = None
    safety_identifier: None = None
    prompt_cache_key: None = None

    @model_validator(mode="after")
    def _logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise Failure(400, "top_logprobs goes with logprobs: true", "invalid_value", "top_logprobs")
        return self


class RenderBody(Body):
    """For the page: what a chat becomes."""

    model: str = Field(description="the name of a model, see /v1/models")
    messages: Messages


Parsed = TypeVar("Parsed", bound=Body)


def parse(kind: type[Parsed], content: bytes) -> Parsed:
    """The body as `kind`; Failure (400) for anything else: text that is not UTF-8, JSON, or not what is taken."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise wrong_body(error, {name: field.description or "" for name, field in kind.model_fields.items()}) from None


def expectation(body: Body, name: str) -> str:
    return type(body).model_fields[name].description or ""
