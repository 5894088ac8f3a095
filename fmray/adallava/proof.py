"""Prove that the adaptive model computes what the stock model does.

An adaptive model calls the pieces of a stock model itself (`fmray.adallava.families.Backbone`). A
piece that a family adds, such as features that enter between layers, would be left out silently.
`prove` runs one random row through both, and refuses the model if they differ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fmray.adallava.execution import LayerCache, LayerInputs

TOKENS = 8
IMAGE_TOKENS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
#: largest difference of logits, relative to the largest logit; the same kernels run in both
TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


@torch.no_grad()
def prove(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Compare a full plan with the stock forward, decoding with it, and skipping with masking.

    Args:
        model: an `AdaptiveVLM`.
        inputs: one row as the processor gives it (input_ids [1, n], pixel_values, ...). Without it,
            random text.

    Returns:
        The largest difference of each comparison, relative to the largest logit.

    Raises:
        ValueError: a difference is larger than rounding, or the decoder cannot be run.
    """
    backbone = model.backbone
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("a model without weights proves nothing")
    row = dict(inputs) if inputs is not None else _random_text(model)
    was_training = model.training
    model.eval()
    try:
        differences = _differences(model, row)
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"a {backbone.kind} model cannot be made adaptive: its decoder does not run layer by"
            f" layer ({type(error).__name__}: {reason})"
        ) from error
    finally:
        model.train(was_training)
    tolerance = TOLERANCE[next(model.base.parameters()).dtype]
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise ValueError(
                f"a {backbone.kind} model cannot be made adaptive: {name} differs from the stock"
                f" model by {difference:.2g} of its largest logit"
            )
    return differences


def _random_text(model: nn.Module) -> dict[str, Tensor]:
    """Return a row [1, TOKENS] of ids that stand for text."""
    config, device = model.backbone.config, model.backbone.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=generator)
    images = {getattr(model.base.config, name, None) for name in IMAGE_TOKENS}
    for token in sorted(images - {None}):
        ids[ids == token] = (token + 1) % config.vocab_size
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _differences(model: nn.Module, row: Mapping[str, Tensor]) -> dict[str, float]:
    backbone, layout = model.backbone, model.layout
    ids = row["input_ids"]
    extras = {k: v for k, v in row.items() if k not in ("input_ids", "attention_mask")}
    stock = model.base(**row).logits
    pixels = extras.pop("pixel_values", None)
    backbone.check_inputs(extras)

    # every layer on, without a latency token
    features = None if pixels is None else backbone.image_features(pixels, extras)
    embeddings, added = backbone.embed(ids, None, extras, features), backbone.added(ids, features)
    positions = backbone.positions(ids, row.get("attention_mask"), extras, count=False)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    caches = [LayerCache() for _ in backbone.layers]
    full = backbone.logits(_run(model, embeddings, positions, caches, added))

    # the last token alone, with the keys of the tokens before it
    for cache in caches:
        cache.drop_last()
    token = _run(model, embeddings[:, -1:], positions[..., -1:], caches)
    decoded = backbone.logits(token)

    # half of the units
    plan = torch.zeros(1, layout.num_units, dtype=torch.bool, device=ids.device)
    plan[:, ::2] = True
    pairs = [("a full plan", full, stock), ("decoding with a cache", decoded, stock[:, -1:])]
    if _runs_both_ways(model):
        masked, skipped = (
            model(**row, plan=plan, execution=kind).logits for kind in ("masked", "skipped")
        )
        pairs.append(("skipping layers (against masking them)", skipped, masked))
    largest = float(stock.float().abs().max()) or 1.0
    return {
        name: float((ours.float() - theirs.float()).abs().max()) / largest
        for name, ours, theirs in pairs
    }


def _runs_both_ways(model: nn.Module) -> bool:
    """Return whether the model has both executions: training needs one, serving the other."""
    adapters = any(".lora_" in name for name, _ in model.named_parameters())
    skips = model.layout.design == "layers" or not adapters
    masks = model.latency_token == "inline" or model.backbone.attention in ("sdpa", "eager")
    return skips and masks


def _run(
    model: nn.Module,
    hidden: Tensor,
    positions: Tensor,
    caches: list[LayerCache],
    added: Tensor | None = None,
) -> Tensor:
    """Run all layers on hidden states [1, n, d], which follow the keys in the caches."""
    backbone = model.backbone
    alone = hidden.shape[1] == 1
    mask = None if alone else backbone.causal_mask(hidden, None, positions)
    inputs = LayerInputs(
        mask, backbone.rotary(hidden, positions), positions if positions.dim() == 2 else None
    )
    for index, (layer, cache) in enumerate(zip(backbone.layers, caches, strict=True)):
        hidden = inputs.run(layer, hidden, cache)
        if added is not None and index < len(added):
            hidden = hidden + added[index]
    return hidden
