"""An adaptive training step against one of the stock model, with the same batch, in one process.

    python benchmarks/train_step.py [--runs 7]

A step is forward, backward and AdamW. The bar is 1.25; design H multiplies activations by masks.
"""

from __future__ import annotations

import argparse

import torch
from skip import IMAGE_ID, IMAGE_TOKENS, stock_model
from timing import compare

from fmray.adallava import AdaptiveVLM, SwitchLayout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4, help="samples in the batch")
    parser.add_argument("--tokens", type=int, default=160)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = stock_model(device, dtype).train()
    base.model.vision_tower.requires_grad_(False)
    ids = torch.randint(4, 1024, (options.rows, options.tokens), device=device)
    ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_ID
    labels = ids.clone()
    labels[:, : options.tokens - 32] = -100
    data = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(options.rows, 3, 64, 64, device=device, dtype=dtype),
        "labels": labels,
    }
    print(f"{options.rows} x {options.tokens} tokens, {device} {dtype}")

    def step(model: torch.nn.Module, **arguments: torch.Tensor):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6)

        def once() -> None:
            model(**data, **arguments).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return once

    text = base.config.text_config
    for design, layout, token in (
        ("L", SwitchLayout.layers(text), "inline"),
        ("L", SwitchLayout.layers(text), "probe"),
        ("H", SwitchLayout.heads(text, unit=4), "inline"),
    ):
        model = AdaptiveVLM.from_base(base, layout, latency_token=token).train()
        units_on = torch.randint(0, layout.num_units + 1, (options.rows,), device=device)
        name = f"{design} {token}: adaptive step / stock step"
        compare(name, step(model, units_on=units_on), step(base), options.runs, 1.25)


if __name__ == "__main__":
    main()
