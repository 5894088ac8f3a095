"""`fmray ask`: one question about one picture, under a budget.

In: a picture, a question, a budget, and a model: a directory, or a name in the registry. Out: the
answer, and what it cost: which layers ran and the share of the decoder's operations.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmray.adallava import AdaptiveVLM

STORAGE = Path("fmray-quickstart")  # where `fmray quickstart` puts its runs
MODEL = "fmray-shapes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fmray ask`."""
    parser.add_argument("image", type=Path, help="a picture file")
    parser.add_argument("question", help="what to ask about it")
    parser.add_argument(
        "--budget",
        default="1.0",
        help="share of the decoder's operations, such as 0.6 (default 1.0)",
    )
    parser.add_argument(
        "--model",
        default=MODEL,
        help="directory of an adaptive model, or a name in the registry, whose production version "
        f"is taken (default {MODEL}, the quickstart's)",
    )
    parser.add_argument(
        "--storage",
        type=Path,
        default=STORAGE,
        help=f"storage folder whose registry knows the name (default {STORAGE})",
    )
    parser.add_argument(
        "--uri", default=None, help="MLflow server, where it is not in the storage folder"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Answer, and print the answer with its plan."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(options.image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{options.image}: not a picture that can be read (PNG, JPEG, WebP)"
        ) from error
    directory = find_model(options.model, options.storage, options.uri)

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch

    from fmray.adallava import AdaptiveVLM
    from fmray.data.processor import load_processor
    from fmray.data.records import chat_messages

    model = AdaptiveVLM.from_pretrained(directory)
    processor = load_processor(directory)
    messages = chat_messages([{"from": "human", "value": f"<image>\n{options.question}"}])
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = dict(
        processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
    )
    inputs.pop("token_type_ids", None)
    start = time.perf_counter()
    with torch.inference_mode():
        ids, plan = model.generate(
            **inputs, budget=options.budget, max_new_tokens=options.max_new_tokens, return_plan=True
        )
    milliseconds = 1e3 * (time.perf_counter() - start)
    prompt = inputs["input_ids"].shape[1]
    answer = processor.decode(ids[0, prompt:], skip_special_tokens=True).strip()
    units_on = int(plan[0].sum())
    share = model.cost.share(prompt + (model.latency_token == "inline"), units_on)
    if options.json:
        print(
            json.dumps(
                {
                    "answer": answer,
                    "budget": options.budget,
                    "units_on": units_on,
                    "units": model.layout.num_units,
                    "share": share,
                    "plan": plan[0].tolist(),
                    "milliseconds": milliseconds,
                }
            )
        )
        return 0
    print(answer)
    what_ran = describe_plan(model, plan[0].tolist())
    print(f"budget {options.budget}: {what_ran}, {100 * share:.1f} % of the decoder's operations,")
    print(f"{milliseconds:.0f} ms for prefill and decoding")
    return 0


def find_model(name: str, storage: Path, uri: str | None) -> Path:
    """The directory of a model given as a directory, or by its name in the registry.

    Raises ValueError when it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    from fmray.config import TrackingConfig
    from fmray.runtime.tracking import production

    if uri is None and not storage.is_dir():
        raise ValueError(
            f"no model: {name!r} is no directory, and there is no storage folder {storage} to look "
            "it up in; run `fmray quickstart` first, or give --model DIRECTORY"
        )
    return production(TrackingConfig(uri=uri), storage, name)


def describe_plan(model: AdaptiveVLM, plan: list[bool]) -> str:
    """Which layers ran, as a strip: `=` always on, `#` on, `+` partly on, `.` off."""
    layout = model.layout
    width = layout.units_per_layer
    strip = "=" * layout.first
    for start in range(0, len(plan), width):
        on = sum(plan[start : start + width])
        strip += "#" if on == width else "+" if on else "."
    return f"layers [{strip}], {sum(plan)} of {len(plan)} switches on"
