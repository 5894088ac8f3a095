"""Settings that are right one by one and wrong together.

In: a recipe whose values have passed their own checks. Out: each clash as
(dotted key, text), the text saying what would be right. The recipe's validator turns the first one
into an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from fmray.config import AdaptiveConfig, ClusterConfig, Recipe, ScratchConfig

S3_OPTIONS = {"endpoint_override", "region", "scheme"}


def conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The clashes of a recipe: (dotted key, what is wrong and what would be right)."""
    model, data, train, zero = recipe.model, recipe.data, recipe.train, recipe.zero
    yield from _scratch_conflicts(model.scratch)
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield "model.attention", "flash_attention_2 needs model.dtype: bfloat16 (or use sdpa)"
    if recipe.adaptive:
        yield from _adaptive_conflicts(recipe, recipe.adaptive)
    elif set(model.freeze) == {"vision", "projector", "language"} and not model.lora:
        yield "model.freeze", "all three parts are frozen and nothing learns; leave one out"
    if data.train and data.shapes:
        yield "data.train", "data.shapes generates the data; set one of the two to null"
    if data.validation and not data.train:
        yield "data.validation", "needs data.train beside it"
    if zero.offload_parameters == "cpu" and zero.stage != 3:
        yield "zero.offload_parameters", f"needs zero.stage: 3, not {zero.stage} (or use none)"
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        yield "zero.offload_optimizer", "needs zero.stage: 1, 2 or 3, not 0 (or use none)"
    micro = f"micro_batch {train.micro_batch}"
    yield from batch_conflicts(
        recipe.cluster, "train.global_batch", train.global_batch, train.micro_batch, micro
    )
    uri = recipe.tracking.uri
    if uri is not None and not re.match(r"https?://.|sqlite:///.", uri):
        yield (
            "tracking.uri",
            f"should be http(s)://HOST or sqlite:///FILE, not {uri!r} (MLflow 3 has no file store)",
        )
    if recipe.tracking.register_as and not recipe.tracking.enabled:
        yield "tracking.register_as", "the model registry needs tracking.enabled: true"


def batch_conflicts(
    cluster: ClusterConfig, key: str, batch: int, unit: int, unit_name: str
) -> Iterator[tuple[str, str]]:
    """Whether a step's `batch` divides into whole passes of `unit`, or, where the number of workers
    changes, whether there is something for each; some passes are then not full."""
    most = cluster.world_sizes[-1]
    if len(cluster.world_sizes) > 1:
        if batch < most:
            yield key, f"{batch} leaves nothing for some of {most} workers; {most} or more would do"
        return
    step = most * unit
    if batch % step:
        right = " or ".join(str(n * step) for n in (batch // step, -(-batch // step)) if n)
        yield (
            key,
            f"{batch} is not a multiple of {most} workers x {unit_name} = {step};"
            f" {right} would be right",
        )


def _scratch_conflicts(scratch: ScratchConfig) -> Iterator[tuple[str, str]]:
    kv_heads = scratch.kv_heads or scratch.heads
    if scratch.heads % kv_heads:
        yield (
            "model.scratch.kv_heads",
            f"should divide heads ({scratch.heads}); {kv_heads} does not",
        )
    # Rotary embeddings turn pairs of channels: a head needs an even number of them.
    if scratch.hidden % (2 * scratch.heads):
        yield (
            "model.scratch.hidden",
            f"{scratch.hidden} should be a multiple of 2 x heads = {2 * scratch.heads}",
        )
    if scratch.vision_hidden % scratch.vision_heads:
        yield (
            "model.scratch.vision_hidden",
            f"{scratch.vision_hidden} should be a multiple of vision_heads ="
            f" {scratch.vision_heads}",
        )
    if scratch.image_size % scratch.patch_size:
        yield (
            "model.scratch.image_size",
            f"{scratch.image_size} should be a multiple of patch_size = {scratch.patch_size}",
        )


def _adaptive_conflicts(recipe: Recipe, adaptive: AdaptiveConfig) -> Iterator[tuple[str, str]]:
    if adaptive.latency_token == "probe" and recipe.model.attention == "flash_attention_2":
        yield (
            "adaptive.latency_token",
            "probe needs an attention mask of its own: use model.attention: sdpa, or inline",
        )
    if recipe.model.source != "scratch":
        return
    layers = recipe.model.scratch.layers
    first = adaptive.first or layers // 2
    if first >= layers:
        yield (
            "adaptive.first",
            f"{first} leaves no layer to switch; at most {layers - 1} for {layers} layers",
        )
    # The layers before `first` always run, and the output head beside them: no plan costs less.
    elif adaptive.min_budget is not None and adaptive.min_budget < first / layers:
        yield (
            "adaptive.min_budget",
            f"{adaptive.min_budget} is below what the first {first} of {layers} layers cost; at"
            f" least {first / layers:.3g}, or null",
        )


def check_mirror(value: str) -> str:
    """The URI, if it is one of a store and holds no credentials."""
    parts = urlsplit(value)
    secret = parts.password or (parts.scheme == "s3" and parts.username)
    if secret or re.search("key|secret|token", parts.query, re.IGNORECASE):
        text = (
            "credentials do not belong in a recipe: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            " on the nodes, or use the instance's role"
        )
        # as a clash of settings is said: without the value
        context = {"key": "cluster.mirror", "text": text}
        raise PydanticCustomError("conflict", "{key}: {text}", context)
    if parts.scheme == "s3":
        unknown = [name for name, _ in parse_qsl(parts.query) if name not in S3_OPTIONS]
        if parts.netloc and not unknown:
            return value
    elif parts.scheme or value.startswith("/"):
        return value
    raise PydanticCustomError(
        "mirror",
        "should be s3://BUCKET/PREFIX, with ?region=, endpoint_override= or scheme=;"
        " another URI that pyarrow opens; or an absolute path",
    )
