"""`fmray cost`: the units, operations and roofline times of a model under budgets.

It prints a table, or JSON. No weights are loaded and nothing is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from fmray.adallava.cost import CostModel, exact_number
from fmray.adallava.layout import SwitchLayout
from fmray.adallava.presets import (
    DEVICES,
    PRESETS,
    CostedModel,
    device,
    load,
    prefill_seconds,
    preset,
)
from fmray.runtime.files import dumps

DEFAULT_BUDGETS = ("1.0", "0.95", "0.85", "0.75", "0.65", "0.6", "0.5")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fmray cost` to `parser`."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    model.add_argument(
        "--config", metavar="PATH_OR_NAME", help="a directory, a config.json or a hub name"
    )
    parser.add_argument(
        "--design", choices=("layers", "heads"), default="layers", help="default: layers"
    )
    parser.add_argument("--first", type=int, help="first switchable layer; default: half")
    parser.add_argument(
        "--unit", type=int, default=8, help="heads per unit, --design heads; default: 8"
    )
    parser.add_argument(
        "--tokens",
        help="prompt length, or one per layer (comma separated); default: the preset's mean prompt",
    )
    parser.add_argument(
        "--fastv",
        metavar="K:R",
        help="FastV: from layer K on, drop the share R of the image tokens (2:0.5)",
    )
    parser.add_argument(
        "--budget", action="append", help="repeatable; default: " + " ".join(DEFAULT_BUDGETS)
    )
    parser.add_argument(
        "--device",
        action="append",
        metavar="NAME",
        help=f"roofline device, repeatable; default: all of {', '.join(DEVICES)}",
    )
    parser.add_argument(
        "--convention",
        choices=("exact", "llm-viewer"),
        default="exact",
        help="exact: 2 operations per multiply-accumulate; llm-viewer: the paper's numbers",
    )
    parser.add_argument(
        "--json", action="store_true", help="an object, or a list for several budgets"
    )


def run(args: argparse.Namespace) -> int:
    """Print the costs; return the exit code 0."""
    # The model, its prompt, and the budgets to price.
    source = preset(args.preset) if args.preset else load(args.config)
    layout = (
        SwitchLayout.layers(source.text_config, args.first)
        if args.design == "layers"
        else SwitchLayout.heads(source.text_config, args.first, args.unit)
    )
    model = CostModel(source.text_config, layout, args.convention)
    tokens = _schedule(args, source, layout)
    devices = [device(name) for name in args.device or DEVICES]
    budgets = args.budget
    if budgets is None:
        smallest = model.min_budget(tokens)
        budgets = [budget for budget in DEFAULT_BUDGETS if float(budget) >= smallest]
    # One row per budget.
    rows = []
    for budget in budgets:
        units = model.max_units(budget, tokens)
        rows.append(
            {
                "model": source.name,
                "design": layout.design,
                "convention": model.convention,
                "budget": float(budget),
                "tokens": _plain_tokens(tokens),
                "units_on": units,
                "units": layout.num_units,
                "layers_run": _plain_number(model.layers_run(tokens, units)),
                "layers": layout.num_layers,
                "operations": model.prefill(tokens, units),
                "share": model.share(tokens, units),
                "min_budget": model.min_budget(tokens),
                "roofline_ms": {
                    on.name: round(1e3 * prefill_seconds(model, tokens, units, on), 3)
                    for on in devices
                },
                "vision": _vision(model, source),
            }
        )
    if args.json:
        print(dumps(rows[0] if len(rows) == 1 else rows, indent=2))
    else:
        print(_table(rows, model, source))
    return 0


def _schedule(
    args: argparse.Namespace, source: CostedModel, layout: SwitchLayout
) -> Fraction | list[Fraction]:
    """Return the prompt length, or one per layer, from `--tokens` and `--fastv`."""
    if args.tokens is None and source.tokens is None:
        raise ValueError("--tokens (prompt length with image tokens) is needed with --config")
    parts = [source.tokens] if args.tokens is None else args.tokens.split(",")
    lengths = [exact_number(part, "--tokens") for part in parts]
    if args.fastv is None:
        return lengths[0] if len(lengths) == 1 else lengths
    if len(lengths) > 1:
        raise ValueError("--fastv needs one --tokens, not one per layer")
    layer_text, _, share_text = args.fastv.partition(":")
    if not layer_text.isdecimal() or not share_text:
        raise ValueError(f"--fastv is {args.fastv!r}; it is K:R, such as 2:0.5")
    layer, share = int(layer_text), exact_number(share_text, "--fastv's R")
    if not 1 <= layer < layout.first:
        raise ValueError(
            f"--fastv's K is {layer}; it must be in 1..{layout.first - 1}, below the first unit"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"--fastv's R is {share_text}; the dropped share of image tokens is 0..1")
    if not 0 < source.visual_tokens < lengths[0]:
        raise ValueError(
            f"--fastv needs image tokens within the prompt: {source.name} has "
            f"{source.visual_tokens} of {float(lengths[0]):g}"
        )
    dropped = int(share * source.visual_tokens)
    return [lengths[0]] * layer + [lengths[0] - dropped] * (layout.num_layers - layer)


def _vision(model: CostModel, source: CostedModel) -> dict[str, int] | None:
    if source.vision_config is None:
        return None
    return asdict(model.vision(source.vision_config, feature_layer=source.feature_layer))


def _plain_number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)


def _plain_tokens(tokens: Fraction | list[Fraction]) -> Any:
    return [_plain_number(n) for n in tokens] if isinstance(tokens, list) else _plain_number(tokens)


def _table(rows: list[dict[str, Any]], model: CostModel, source: CostedModel) -> str:
    layout = model.layout
    tokens = rows[0]["tokens"]
    if isinstance(tokens, list):
        changes = [i for i in range(len(tokens)) if i == 0 or tokens[i] != tokens[i - 1]]
        tokens = ", ".join(f"{tokens[i]:g} from layer {i}" for i in changes)
    else:
        tokens = f"{tokens:g}"
    units = (
        "complete layers"
        if layout.design == "layers"
        else f"{layout.units_per_layer} per layer, of up to {layout.unit} heads"
    )
    devices = list(rows[0]["roofline_ms"])
    lines = [
        f"{source.name}: {layout.num_layers} decoder layers, {layout.num_units} units "
        f"({units}) from layer {layout.first}",
        f"prompt tokens: {tokens}; MLP of {model.mlp_matrices} matrices",
        f"operations: convention {model.convention}, one prefill with lm_head, vision not included",
        f"share: of the decoder layers; the smallest budget is {rows[0]['min_budget']}",
        "time: roofline, not measured (data-sheet peak and bandwidth, 16 bit, batch 1), in ms",
        "",
    ]
    table = [["budget", "units on", "layers run", "operations", "share", *devices]]
    table += [
        [
            f"{row['budget']:g}",
            f"{row['units_on']}/{row['units']}",
            f"{row['layers_run']:g}/{row['layers']}",
            f"{row['operations'] / 1e12:.3f} T",
            f"{100 * row['share']:.2f} %",
            *(f"{row['roofline_ms'][name]:.2f}" for name in devices),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines += [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    ]
    vision = rows[0]["vision"]
    if vision is not None:
        lines += ["", "outside the budget, per image (2 operations per multiply-accumulate):"]
        lines += [
            f"  {label:<45}{vision[key] / 1e12:.4f} T"
            for label, key in (
                ("patch embedding", "patch_embedding"),
                ("vision tower, up to the layer in use", "tower"),
                ("vision tower, unused layers", "unread"),
                ("projector", "projector"),
            )
        ]
    return "\n".join(lines)
