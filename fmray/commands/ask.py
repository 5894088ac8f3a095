"""`fmray ask`: asks a model one question about one image, under a budget.

Prints the answer and its cost: which layers ran, and their share of the decoder's operations.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fmray.runtime.files import dumps

if TYPE_CHECKING:
    from fmray.adallava import AdaptiveVLM
    from fmray.data.images import DecodedImage

STORAGE = Path("fmray-quickstart")  # where `fmray quickstart` puts its runs
MODEL = "fmray-shapes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fmray ask`."""
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("question", help="question about the image")
    parser.add_argument(
        "--budget",
        default="1.0",
        help="share of the decoder's operations, such as 0.6 (default 1.0)",
    )
    parser.add_argument(
        "--model",
        default=MODEL,
        help="directory of an adaptive model, or the name of a registered one, of which the "
        f"production version is used (default {MODEL}, the quickstart's)",
    )
    parser.add_argument(
        "--storage",
        type=Path,
        default=STORAGE,
        help=f"storage folder with the registry (default {STORAGE})",
    )
    parser.add_argument(
        "--uri", default=None, help="MLflow server, if not the one in the storage folder"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the answer and its plan."""
    from fmray.data.images import CHANGES

    decoded = read_image(options.image)
    directory = find_model(options.model, options.storage, options.uri)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from fmray.adallava import AdaptiveVLM
    from fmray.data.processor import load_processor
    from fmray.data.records import chat_messages, find_control_token, needs_special_tokens

    disable_progress_bar()  # of loading weights
    model = AdaptiveVLM.from_pretrained(directory)
    processor = load_processor(directory)
    question = [{"from": "human", "value": f"<image>\n{options.question}"}]
    control = find_control_token(processor, question)
    if control is not None:
        raise ValueError(f"the question {control.removeprefix('turn 0 ')}")
    text = processor.apply_chat_template(chat_messages(question), add_generation_prompt=True)
    special = needs_special_tokens(processor, text)
    inputs = dict(
        processor(images=decoded.image, text=text, return_tensors="pt", add_special_tokens=special)
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
            dumps(
                {
                    "answer": answer,
                    "budget": options.budget,
                    "units_on": units_on,
                    "units": model.layout.num_units,
                    "share": share,
                    "plan": plan[0].tolist(),
                    "milliseconds": milliseconds,
                    "image_changes": list(decoded.changes),
                }
            )
        )
        return 0
    print(answer)
    print(f"budget {options.budget}: {describe_plan(model, plan[0].tolist())},")
    print(f"{100 * share:.1f} % of the decoder's operations, {milliseconds:.0f} ms")
    if decoded.changes:
        print("image: " + ", ".join(CHANGES[change] for change in decoded.changes))
    return 0


def read_image(path: Path) -> DecodedImage:
    """Decode an image file.

    Raises:
        ValueError: it is no readable image.
    """
    from fmray.data.images import ImageError, decode_image

    try:
        return decode_image(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error


def find_model(name: str, storage: Path, uri: str | None) -> Path:
    """Return the directory of a model given by its directory or by its name in the registry.

    Raises:
        ValueError: it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    from fmray.config import TrackingConfig
    from fmray.runtime.tracking import production

    if uri is None and not storage.is_dir():
        raise ValueError(
            f"no model {name!r}: it is not a directory, and there is no storage folder {storage} "
            "with a registry; run `fmray quickstart` first, or give --model DIRECTORY"
        )
    return production(TrackingConfig(uri=uri), storage, name)


def describe_plan(model: AdaptiveVLM, plan: list[bool]) -> str:
    """Return which layers ran, as a strip: `=` always on, `#` on, `+` partly on, `.` off."""
    layout = model.layout
    width = layout.units_per_layer
    strip = "=" * layout.first
    for start in range(0, len(plan), width):
        on = sum(plan[start : start + width])
        strip += "#" if on == width else "+" if on else "."
    return f"layers [{strip}], {sum(plan)} of {len(plan)} units on"
