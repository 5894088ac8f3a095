"""The wire format of the endpoint: OpenAI's chat completions plus fmray's own fields.

`parse_request` turns a request body into a `ChatRequest` or raises an `ApiError`, which has
OpenAI's error shape. A field that OpenAI defines and this server does not support is rejected by
name, unless its value is null or has no effect (`n: 1`, `tools: []`, `top_k: -1`). Labels such as
`user` and `metadata`, and an image's `detail`, are accepted and ignored. No error repeats content
that the client sent. The response models also define the OpenAPI document.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from fmray.config.yaml_file import reason_of

MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_MESSAGES = 1000  # validation holds the interpreter: other requests wait for it
_MAX_URL_LENGTH = 24 * 2**20  # base64; the limit on the complete body is lower by default
# Unsupported fields of OpenAI, vLLM or SGLang -> the values that are accepted because they have no
# effect. Null is accepted for all of them.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "include_obfuscation": (False,),
    "continuous_usage_stats": (False,),
    "refusal": (),
    "tool_calls": ([],),
    "annotations": ([],),
    # Of vLLM and SGLang
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "continue_final_message": (False,),
    "echo": (False,),
    "chat_template_kwargs": ({},),
}


# --- Errors ---


class ApiError(Exception):
    """An error response in OpenAI's shape. It never contains what the client sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        detail: str = "",
    ) -> None:
        """Describe the response; `detail` is logged with a failure and not sent."""
        super().__init__(message)
        self.detail = detail
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class ErrorDetail(BaseModel):
    """The error of a response."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an error response, as OpenAI defines it."""

    error: ErrorDetail


# --- Requests ---


class RequestModel(BaseModel):
    """Base of the request models: rejects unknown fields and treats null as absent."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if value is not None
            and (key in cls.model_fields or not _has_no_effect(value, _NO_EFFECT.get(key, ())))
        }


def _has_no_effect(value: Any, accepted: tuple[Any, ...]) -> bool:
    return any(type(value) in (type(item), float) and value == item for item in accepted)


class ImageUrl(RequestModel):
    """An image as a data: URL. `detail` is accepted and ignored."""

    url: str = Field(
        min_length=1, max_length=_MAX_URL_LENGTH, description="data:image/...;base64,..."
    )
    detail: Literal["auto", "low", "high", "original"] = "auto"


Label = Annotated[str | None, Field(max_length=512, description="accepted and ignored")]


class TextPart(RequestModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImagePart(RequestModel):
    """An image part of a message."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl,
        BeforeValidator(
            lambda value: {"url": value} if isinstance(value, str) else value,
            json_schema_input_type=ImageUrl | str,
        ),
    ]


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(RequestModel):
    """One turn of the conversation. Only user messages may contain images.

    An assistant's turn may be empty, as an answer may be.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] = ""
    name: Label = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if not self.content and self.role != "assistant":
            raise ValueError("content is empty")
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError("only user messages may contain images")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as a list of parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return list(self.content)


class StreamOptions(RequestModel):
    """Options of a streamed answer."""

    include_usage: bool = False  # end the stream with a chunk of token counts


def _read_budget(value: Any) -> Any:
    """Return a number or decimal text in (0, 1] as exact decimal text, and `auto` as None."""
    wrong = "must be a number in (0, 1], such as 0.6 or '0.6', or 'auto'"
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(wrong)
    if isinstance(value, str):
        if len(value) > 32 or not re.fullmatch(r"[01]?\.[0-9]+|[01]\.?", value, re.ASCII):
            raise ValueError(wrong)
        text = value
    else:
        if not math.isfinite(value):
            raise ValueError(wrong)
        text = str(value)
    number = Decimal(text)
    if not 0 < number <= 1:
        raise ValueError(wrong)
    plain = format(number, "f")  # 1e-3 as 0.001
    if len(plain) > 64:
        raise ValueError(wrong)
    return plain


Budget = Annotated[
    str | None,
    BeforeValidator(_read_budget, json_schema_input_type=float | str),
    Field(
        description="share of the decoder's operations in (0, 1], as a number or decimal text; "
        "omitted or `auto`: chosen by the current load",
    ),
]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


def _read_integer(value: Any) -> Any:
    """Return 2.0 as 2: JSON has one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_read_integer)]


def _check_single_choice(value: int) -> int:
    if value != 1:
        raise ValueError("this server returns one choice per request")
    return value


class ChatRequest(RequestModel):
    """The body of a chat completion request."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Integer | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: Integer | None = Field(None, ge=1, le=2**31)
    temperature: float = Field(0.0, ge=0, le=2, description="default 0: greedy decoding")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            StopText | list[StopText],
            AfterValidator(lambda value: [value] if isinstance(value, str) else value),
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[
        Integer, AfterValidator(_check_single_choice), Field(json_schema_extra={"const": 1})
    ] = 1
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    metadata: dict[str, Any] | None = Field(None, description="accepted and ignored")
    store: bool | None = Field(None, description="accepted and ignored: nothing is stored")

    budget: Budget = None
    deadline_ms: float | None = Field(
        None, gt=0, le=3.6e6, description="milliseconds; the largest budget that meets it is used"
    )
    deadline_of: Literal["first_token", "answer"] | None = Field(
        None, description="default: answer if max_tokens is given, else first_token"
    )
    strict: bool = Field(False, description="return 503 instead of an answer after the deadline")
    plan: bool = Field(False, description="report which units were on")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: requires stream: true")
        if self.stop is not None and len(self.stop) > 4:
            raise ValueError("stop: at most 4 strings")
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: differs from max_completion_tokens; set only one of them")
        if self.budget is not None and self.deadline_ms is not None:
            raise ValueError("deadline_ms: cannot be combined with budget; set one of them")
        if self.deadline_ms is None and (self.strict or self.deadline_of):
            raise ValueError("deadline_ms: required by strict and deadline_of")
        return self

    @property
    def token_limit(self) -> int | None:
        """`max_tokens`, under either of its names."""
        return self.max_tokens or self.max_completion_tokens


# --- Parsing ---

_OPENING, _CLOSING = (b"[", b"{"), (b"]", b"}")
# Up to the next bracket, brace or comma outside of strings, or to the end of the text. A string
# that does not close reaches to the end. Every position starts a match: no byte is read twice.
_TO_MARK = re.compile(
    rb'(?:[^"\[\]{},]*+"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))*+[^"\[\]{},]*+(?:([\[\]{},])|\Z)',
    re.DOTALL,
)


def check_json(body: bytes) -> None:
    """Check the depth and the number of values of a JSON text before it is parsed.

    The time is linear in the length of any text, valid or not. Other requests wait meanwhile, so
    the loop has few steps: strings are skipped by the regular expression.

    Raises:
        ApiError: 400 if the text is nested too deeply or has too many values.
    """
    # an upper bound of both, strings included: enough for most bodies, and images are long strings
    opened = body.count(b"[") + body.count(b"{")
    if opened <= MAX_DEPTH and opened + body.count(b",") <= MAX_VALUES:
        return
    depth = values = 0
    for match in _TO_MARK.finditer(body):
        mark = match[1]
        if mark is None:  # the end of the text
            return
        if mark in _OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise ApiError(
                    400, f"the JSON is nested more than {MAX_DEPTH} deep", code="invalid_json"
                )
        elif mark in _CLOSING:
            depth -= 1
            if depth < 0:  # the parser finds it
                return
            continue
        values += 1
        if values > MAX_VALUES:
            raise ApiError(400, f"the JSON has more than {MAX_VALUES} values", code="invalid_json")


def parse_request(body: bytes) -> ChatRequest:
    """Return the request in a body.

    Raises:
        ApiError: 400 naming the field that is wrong, never its content.
    """
    check_json(body)
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)
    raise _api_error(problems)


def _api_error(problems: list[ErrorDetails]) -> ApiError:
    """Return the answer to an invalid request; `fmray.config.yaml_file` words the reason."""
    # Every branch of a union reports an error; the branch that was meant has the deepest location.
    # An unknown field is the most helpful error of all.
    problem = max(problems, key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    kind = problem["type"]
    place = _place(problem["loc"])
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON (UTF-8)", code="invalid_json")
    if kind == "extra_forbidden":
        name = str(problem["loc"][-1])
        if not re.fullmatch(r"\w{1,64}", name, re.ASCII):
            place, name = "", "an unknown field"
        return ApiError(
            400, f"{name} is not supported by this server", code="unsupported_field", param=place
        )
    text = reason_of(problem, secret=True)
    if not problem["loc"] or place == "":
        head, colon, rest = text.partition(": ")
        place, text = (head, rest) if colon and head.isidentifier() else (None, text)
    message = f"{place}: {text}" if place else text
    return ApiError(400, message, code="invalid_value", param=place)


def _place(location: tuple[Any, ...]) -> str:
    """Return a Pydantic location as `messages[0].content[1].text`, without names of union
    branches."""
    text, before = "", None
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (isinstance(before, int) and part in ("text", "image_url")) and (
            part != "str" and re.fullmatch(r"[a-z_]{1,64}", part)
        ):
            text += f".{part}"
        before = part
    return text.removeprefix(".")


# --- Responses ---


class Usage(BaseModel):
    """Token counts. Prompt tokens include image tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Fmray(BaseModel):
    """The `fmray` object of an answer: its budget, its cost and its times."""

    budget: float
    units_on: int
    units: int  # K
    share: float  # of the decoder's operations on the prompt, under the plan that ran
    deadline_of: Literal["first_token", "answer"]
    predicted_ms: float  # from the request's arrival to what `deadline_of` names
    measured_ms: float  # the same interval, measured
    first_token_ms: float | None
    answer_ms: float
    deadline_ms: float | None = None
    deadline_met: bool | None = None
    vision_hit: bool = False  # the image features came from the cache
    prefix_tokens: int = 0  # prompt tokens whose keys and values came from the cache
    layers: int  # of the decoder
    first_layer: int  # the first switchable layer
    units_per_layer: int
    plan: list[bool] | None = None  # [K], if the request asked for it


class AnswerMessage(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only choice of an answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    fmray: Fmray


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The only choice of a chunk."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a stream. The last one contains `fmray`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    fmray: Fmray | None = None


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fmray"] = "fmray"
    min_budget: float  # accepted for prompts of any length


class ModelList(BaseModel):
    """All served models: this server has one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
