"""`fmray models`: check whether a model can be made adaptive, or register that of a finished run.

`register` gives the version the alias `production`, which `fmray ask` and
`fmray serve --set model=models:/NAME@production` follow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fmray.errors import first_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fmray models`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action")
    text = "load a model and prove that it can be made adaptive"
    check = actions.add_parser("check", help=text, description=text)
    check.add_argument("source", metavar="NAME", help="hub name, folder, or GGUF file")
    check.add_argument("--revision", help="branch, tag or commit on the hub")
    check.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    text = "register a finished run's model and make it the production version"
    register = actions.add_parser("register", help=text, description=text)
    register.add_argument("run_id", metavar="RUN", help="run id, or the run's folder")
    register.add_argument("name", metavar="NAME", help="name in the registry")
    register.add_argument(
        "--storage",
        type=Path,
        default=Path("runs"),
        help="cluster.storage of the run (default: runs)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check or register a model.

    Raises:
        ValueError: a model that does not load or cannot be made adaptive; no such run, no model in
            it yet, or tracking is off in its recipe.
        TrackingError: the registry did not answer or refused.
    """
    return _check(arguments) if arguments.action == "check" else _register(arguments)


def _check(arguments: argparse.Namespace) -> int:
    """Prove both designs; return 0 if design L is proven."""
    import torch
    from PIL import Image
    from transformers.utils.logging import disable_progress_bar

    from fmray.adallava import AdaptiveVLM, SwitchLayout
    from fmray.adallava.families import load_base, takes_images
    from fmray.adallava.proof import prove
    from fmray.data.processor import load_processor
    from fmray.data.records import needs_special_tokens

    # the model, as transformers loads it
    disable_progress_bar()
    source, options = arguments.source, {}
    if source.endswith(".gguf"):
        source, options["gguf_file"] = str(Path(source).parent), Path(source).name
    if arguments.revision:
        options["revision"] = arguments.revision
    try:
        base = load_base(source, dtype=getattr(torch, arguments.dtype), **options).eval()
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{arguments.source} does not load: {first_line(error)}") from error

    # a row with an image, as its processor makes it
    row = None
    if takes_images(base.config):
        processor = load_processor(source, arguments.revision)
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        image = Image.linear_gradient("L").convert("RGB")
        special = needs_special_tokens(processor, text)
        made = processor(
            images=[image], text=[text], return_tensors="pt", add_special_tokens=special
        )
        row = {
            name: value.to(base.dtype) if value.is_floating_point() else value
            for name, value in made.items()
        }

    # design L must hold; H needs projections that can be cut
    decoder = base.config.get_text_config()
    for design, make in (("layers", SwitchLayout.layers), ("heads", SwitchLayout.heads)):
        try:
            model = AdaptiveVLM.from_base(base, make(decoder), latency_token="probe")
            differences = prove(model, row)
        except ValueError as error:
            if design == "layers":
                raise
            print(f"design {design}: refused: {error}")
        else:
            print(f"design {design}: proven; largest differences, relative to the largest logit:")
            for name, difference in differences.items():
                print(f"  {name}: {difference:.1e}")
    return 0


def _register(arguments: argparse.Namespace) -> int:
    from fmray.commands.jobs import KINDS
    from fmray.config import load
    from fmray.runtime.registry import register

    folder = Path(arguments.run_id)
    if not (folder / "recipe.yaml").is_file():
        folder = arguments.storage / arguments.run_id
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(
            f"{folder}: no run there (no recipe.yaml); give a run id with --storage, or its folder"
        )
    if not (folder / "model").is_dir():
        raise ValueError(f"{folder}: no model/; the run has not finished")
    kinds = [kind.recipe for kind in KINDS.values()]
    tracking = load(folder / "recipe.yaml", kinds=kinds).recipe.tracking
    version = register(
        tracking, folder.parent, arguments.name, folder / "model", folder.resolve().name
    )
    print(
        f"registered {folder / 'model'} as models:/{arguments.name}@production (version {version})"
    )
    return 0
