"""Prefill at b = 0.6 against b = 1 and the stock model, with a decoder of over 100 M parameters.

    python benchmarks/skip.py [--runs 7] [--rows 1] [--tokens 600]

Prints medians and paired ratios. Runs in one process, on a GPU in bfloat16 if there is one.
"""

from __future__ import annotations

import argparse

import torch
from timing import compare
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fmray.adallava import AdaptiveVLM, SwitchLayout
from fmray.adallava.passes import Draw, decode, prefill

IMAGE_TOKENS, IMAGE_ID = 64, 3


def stock_model(
    device: str,
    dtype: torch.dtype,
    hidden: int = 768,
    layers: int = 16,
    heads: int = 12,
    image_size: int = 64,
) -> LlavaForConditionalGeneration:
    """Return a LLaVA whose decoder has, by default, 113 M parameters without embeddings."""
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=1024,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().to(device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1, help="prompts in the batch")
    parser.add_argument("--tokens", type=int, default=600)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = stock_model(device, dtype)
    decoder = sum(p.numel() for p in base.model.language_model.layers.parameters())
    print(
        f"decoder {decoder / 1e6:.0f} M parameters, {options.rows} x {options.tokens} tokens, "
        f"{device} {dtype}"
    )

    ids = torch.randint(4, 1024, (options.rows, options.tokens), device=device)
    ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_ID
    data = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(options.rows, 3, 64, 64, device=device, dtype=dtype),
    }

    def run(model: AdaptiveVLM, budget: float):
        def once() -> None:
            with torch.no_grad():
                prompt = model.embed_prompt(**data, budget=budget, plan=None, extras={})
                hidden, *_ = prefill(model, prompt, Draw(), keep=True)
                model.backbone.logits(hidden[:, -1])

        return once

    def stock() -> None:
        with torch.no_grad():
            base(**data, use_cache=True, logits_to_keep=1)

    text = base.config.text_config
    for token in ("inline", "probe"):
        layers = AdaptiveVLM.from_base(base, SwitchLayout.layers(text), latency_token=token).eval()
        compare(
            f"L {token}: b = 0.6 / b = 1", run(layers, 0.6), run(layers, 1.0), options.runs, 0.66
        )
        compare(f"L {token}: b = 1 / stock model", run(layers, 1.0), stock, options.runs, 1.03)
    heads = AdaptiveVLM.from_base(base, SwitchLayout.heads(text, unit=4)).eval()
    torch.nn.init.normal_(heads.scheduler.linear.weight)  # plans that mix units of all layers
    compare("H inline: b = 0.6 / b = 1", run(heads, 0.6), run(heads, 1.0), options.runs, 0.75)

    def decoding(budget: float):
        with torch.no_grad():
            prompt = layers.embed_prompt(**data, budget=budget, plan=None, extras={})
            _, _, _, state = prefill(layers, prompt, Draw(), keep=True)
            place = prompt.next_position

        def steps() -> None:
            with torch.no_grad():
                for step in range(16):
                    decode(layers, ids[:, 0], place + step, state)

        return steps

    compare("L probe: 16 decoding steps, b = 0.6 / b = 1", decoding(0.6), decoding(1.0), 3, None)


if __name__ == "__main__":
    main()
