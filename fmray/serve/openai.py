"""What the endpoint speaks: OpenAI's chat completions, with fmray's own fields.

In: the bytes of a request. Out: a checked `ChatRequest`, or an `ApiError` in OpenAI's shape; the
answers' shapes are in `answers.py`. A field that OpenAI has and this server does not is refused by
its name, unless it is null or asks for what happens anyway; nothing is silently ignored but `user`
and `detail`.
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

MAX_DEPTH = 32
MAX_VALUES = 50_000
_LONGEST_URL = 24 * 2**20  # base64; the body's own limit is smaller
# A field of OpenAI's -> values that ask for nothing; null always does.
_NO_REQUEST: dict[str, tuple[Any, ...]] = {
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
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
    "annotations": ([],),
}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape. Never holds what the client sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
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


class Part(BaseModel):
    """Base of what is received: unknown fields are refused, null ones are as if not there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if value is not None
            and (key in cls.model_fields or not _asks_nothing(value, _NO_REQUEST.get(key, ())))
        }


def _asks_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    return any(type(value) in (type(one), float) and value == one for one in harmless)


class ImageUrl(Part):
    """Where a picture is: in the URL itself. `detail` is accepted and has no effect."""

    url: str = Field(min_length=1, max_length=_LONGEST_URL, description="data:image/...;base64,...")
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Part):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(Part):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Part):
    """One turn. Pictures belong to users."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]

    @model_validator(mode="after")
    def _pictures(self) -> Self:
        if not self.content:
            raise ValueError("content is empty")
        if self.role != "user" and any(isinstance(part, ImagePart) for part in self.parts):
            raise ValueError("only a user's message may hold pictures")
        return self

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return list(self.content)


class StreamOptions(Part):
    """Whether a stream ends with a chunk of token counts."""

    include_usage: bool = False


def _read_budget(value: Any) -> Any:
    """A number or decimal text in (0, 1] as exact decimal text; `auto` as None."""
    wrong = "a number in (0, 1], such as 0.6 or '0.6', or 'auto'"
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
        description="share of the decoder's operations in (0, 1], a number or decimal text; "
        "left out or `auto`: the load decides",
    ),
]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


def _whole(value: Any) -> Any:
    """2.0 is 2 in JSON, where numbers have no kinds."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def _one(value: int) -> int:
    if value != 1:
        raise ValueError("this server gives one answer a request")
    return value


class ChatRequest(Part):
    """A chat completion asked for."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1)
    max_tokens: Whole | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=2**31)
    temperature: float = Field(0.0, ge=0, le=2, description="0: greedy, which is the default here")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            StopText | list[StopText],
            AfterValidator(lambda value: [value] if isinstance(value, str) else value),
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, AfterValidator(_one), Field(json_schema_extra={"const": 1})] = 1
    user: str | None = Field(None, max_length=256, description="accepted, has no effect")

    budget: Budget = None
    deadline_ms: float | None = Field(
        None, gt=0, le=3.6e6, description="milliseconds; the largest budget that makes it is taken"
    )
    deadline_of: Literal["first_token", "answer"] | None = Field(
        None, description="default: the whole answer where max_tokens is given, else first token"
    )
    strict: bool = Field(False, description="503 rather than an answer after the deadline")
    plan: bool = Field(False, description="say which switches were on")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        if self.stop is not None and len(self.stop) > 4:
            raise ValueError("stop: at most 4 strings")
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens: differs from max_completion_tokens; give one")
        if self.budget is not None and self.deadline_ms is not None:
            raise ValueError("deadline_ms: give budget or deadline_ms, not both")
        if self.deadline_ms is None and (self.strict or self.deadline_of):
            raise ValueError("deadline_ms: strict and deadline_of need it")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """max_tokens under either of its names."""
        return self.max_tokens or self.max_completion_tokens


_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


def check_json(body: bytes) -> None:
    """Refuse JSON that is deep or has very many values, before anything is built from it.

    Raises ApiError (400). Counting commas in texts too is on purpose: it is cheap and bounds both.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise ApiError(400, f"the JSON has more than {MAX_VALUES} values", code="invalid_json")
    depth = 0
    for match in _STRUCTURE.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ApiError(
                    400, f"the JSON is nested more than {MAX_DEPTH} deep", code="invalid_json"
                )
        elif first in b"]}":
            depth -= 1


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError (400) that names the field, never its content."""
    check_json(body)
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
    raise _explain(problems)


def _explain(problems: list[Any]) -> ApiError:
    # Of a union all branches complain, the right one from deepest inside; and an unknown field is
    # the most telling of all.
    problem = max(problems, key=lambda one: (one["type"] == "extra_forbidden", len(one["loc"])))
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
    text = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"] or place == "":
        head, colon, rest = text.partition(": ")
        place, text = (head, rest) if colon and head.isidentifier() else (None, text)
    message = f"{place}: {text}" if place else text
    return ApiError(400, message, code="invalid_value", param=place)


def _place(location: tuple[Any, ...]) -> str:
    """messages[0].content[1].text of a Pydantic location; names of branches of unions are left
    out."""
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


# What the endpoint answers: OpenAI's shapes, with the object `fmray` beside them.
#
# In: texts, token counts and costs. Out: Pydantic models, which also make the OpenAPI document.


class Usage(BaseModel):
    """Token counts; image tokens are among the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Fmray(BaseModel):
    """What the answer cost, and under which budget it was given.

    share: of the decoder's operations on the prompt, of the plan that ran. predicted_ms,
    measured_ms: both of what `deadline_of` says, from the request's arrival. plan: one truth value
    a switch, if asked for; first_layer and units_per_layer say where they sit.
    """

    budget: float
    units_on: int
    units: int
    share: float
    deadline_of: Literal["first_token", "answer"]
    predicted_ms: float
    measured_ms: float
    first_token_ms: float | None
    answer_ms: float
    deadline_ms: float | None = None
    deadline_met: bool | None = None
    vision_hit: bool = False
    prefix_tokens: int = 0
    layers: int
    first_layer: int
    units_per_layer: int
    plan: list[bool] | None = None


class AnswerMessage(BaseModel):
    """The answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer there is."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    fmray: Fmray


class Delta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The one answer there is, in part."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a stream. `fmray` comes in the last one."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    fmray: Fmray | None = None


class ModelCard(BaseModel):
    """One model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fmray"] = "fmray"


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail
