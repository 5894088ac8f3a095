"""What the endpoint answers: OpenAI's shapes, with the object `fmray` beside them.

In: texts, token counts and costs. Out: Pydantic models, which also make the OpenAPI document.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


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
