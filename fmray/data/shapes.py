"""Generate a visual question answering set: small images of coloured shapes, and questions.

`generate` writes a folder in LLaVA's format (`train.json`, `validation.json`, `images/`);
`make_record` makes a single record in memory. A record depends only on (seed, split, index). Some
questions need one look-up ("what color topleft ?"), others two ("what color beside red circle ?"):
find a shape, then read its neighbour.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fmray.config import ShapesConfig
from fmray.runtime.files import dumps, replace_folder

Split = Literal["train", "validation"]
Cell = tuple[str, str] | None  # (color, shape), or empty

COLORS = {
    "red": (230, 30, 30),
    "green": (30, 200, 60),
    "blue": (50, 80, 255),
    "yellow": (250, 230, 40),
    "purple": (160, 40, 200),
    "cyan": (40, 220, 230),
    "orange": (255, 140, 20),
    "white": (255, 255, 255),
}
SHAPES = ("square", "ring", "cross", "triangle", "circle", "diamond")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS += ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen")
VALIDATION_SHARE = 0.1  # share of all possible scenes that only the validation split may show
MARKER = "shapes.json"
VERSION = 1  # in the marker; increase it when a changed generator makes old folders stale


@dataclass(frozen=True)
class Question:
    """A question with its answer."""

    text: str
    answer: str  # one word
    tag: str  # kind of question


def make_record(
    seed: int, split: Split, index: int, config: ShapesConfig
) -> tuple[np.ndarray, list[dict[str, str]], list[str]]:
    """Make a record.

    Returns:
        Image (uint8 [image_size, image_size, 3]), conversation in LLaVA's format, one tag per
        answer.
    """
    cells, random_source = _scene(seed, split, index, config)
    questions = _ask(cells, config, random_source)
    conversation = []
    for number, question in enumerate(questions):
        text = f"<image>\n{question.text}" if number == 0 else question.text
        conversation.append({"from": "human", "value": text})
        conversation.append({"from": "gpt", "value": question.answer})
    image = _draw(cells, config, random_source)
    return image, conversation, [question.tag for question in questions]


def _place_names(grid: int) -> list[str]:
    """Return a word for each cell, row by row."""
    if grid == 2:
        return ["topleft", "topright", "bottomleft", "bottomright"]
    return [f"r{row + 1}c{column + 1}" for row in range(grid) for column in range(grid)]


def _ask(cells: tuple[Cell, ...], config: ShapesConfig, source: random.Random) -> list[Question]:
    """Return 1 to `config.turns` different questions, each with one right answer.

    A question needs two look-ups with probability `config.two_hop`; its kind is drawn uniformly
    from those that the scene allows. `_one_hop` balances the answers of `count` and `compare`, so
    that none of them is the best guess.
    """
    one_hop, two_hop = _one_hop(cells, config, source), _two_hop(cells, config)
    questions: list[Question] = []
    while len(questions) < config.turns and (one_hop or two_hop):
        wants_two = source.random() < config.two_hop
        pool = two_hop if (wants_two and two_hop) or not one_hop else one_hop
        tag = source.choice(list(pool))
        questions.append(pool[tag].pop(source.randrange(len(pool[tag]))))
        if not pool[tag]:
            del pool[tag]
    return questions


def _draw(cells: tuple[Cell, ...], config: ShapesConfig, source: random.Random) -> np.ndarray:
    """Return the image of a scene, uint8 [image_size, image_size, 3].

    Shapes fill 70 % of a cell's side and are moved by up to `config.jitter` pixels.
    """
    size, grid = config.image_size, config.grid
    side = size // grid
    sprite_side = max(3, round(0.7 * side))
    margin = side - sprite_side
    middle, reach = margin // 2, min(config.jitter, margin // 2)
    image = np.zeros((size, size, 3), dtype=np.uint8)
    for index, cell in enumerate(cells):
        jitter_y, jitter_x = source.randint(-reach, reach), source.randint(-reach, reach)
        if cell is None:
            continue
        top = (index // grid) * side + middle + jitter_y
        left = (index % grid) * side + middle + jitter_x
        image[top : top + sprite_side, left : left + sprite_side] = _sprite(*cell, sprite_side)
    return image


def generate(folder: Path, config: ShapesConfig, seed: int) -> None:
    """Write `train.json`, `validation.json` and `images/<split>/<thousand>/<index>.png`.

    Does nothing if `folder` already contains the same set.

    Raises:
        ValueError: `folder` contains something else, or the sizes leave too few scenes or pixels.
    """
    if config.image_size // config.grid < 6:
        raise ValueError(
            f"data.shapes.image_size: {config.image_size} gives "
            f"{config.image_size // config.grid} pixels a cell; "
            f"a grid of {config.grid} needs at least {6 * config.grid}"
        )
    marker = dumps(
        {"version": VERSION, "seed": seed, "config": config.model_dump()}, sort_keys=True
    )
    if (folder / MARKER).exists() and (folder / MARKER).read_text() == marker:
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ValueError(
            f"{folder}: not empty and not made by the shapes generator; name another data.store"
        )
    # not `atomic_folder`, which syncs every file: that takes minutes for 20,000 images
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_split(temporary, "train", config.pictures, config, seed)
    _write_split(temporary, "validation", config.validation_pictures, config, seed)
    (temporary / MARKER).write_text(marker)
    replace_folder(temporary, folder)


def _write_split(folder: Path, split: Split, count: int, config: ShapesConfig, seed: int) -> None:
    records = []
    for index in range(count):
        image, conversation, tags = make_record(seed, split, index, config)
        path = Path("images", split, f"{index // 1000:03d}", f"{index:06d}.png")
        if index % 1000 == 0:
            (folder / path).parent.mkdir(parents=True)
        Image.fromarray(image).save(folder / path, compress_level=1)
        records.append(
            {
                "id": f"{split}-{index:06d}",
                "image": str(path),
                "conversations": conversation,
                "tags": tags,
            }
        )
    (folder / f"{split}.json").write_text(dumps(records))


def _scene(
    seed: int, split: Split, index: int, config: ShapesConfig
) -> tuple[tuple[Cell, ...], random.Random]:
    """Return the cells, row by row, and the random source for questions and jitter.

    A hash of the scene decides which split may show it, so the splits never share a scene.

    Raises:
        ValueError: no scene for the split was found.
    """
    source = random.Random(f"{seed}/{split}/{index}")
    pairs = [
        (color, shape)
        for color in list(COLORS)[: config.colors]
        for shape in SHAPES[: config.shapes]
    ]
    count = config.grid**2
    for _ in range(1000):
        enough = len(pairs) >= count
        shown = source.sample(pairs, count) if enough else source.choices(pairs, k=count)
        cells = tuple(None if source.random() < config.empty else pair for pair in shown)
        if any(cells) and _split_of(cells, seed) == split:
            return cells, source
    raise ValueError(
        f"data.shapes: {config.colors} colors and {config.shapes} shapes on a grid of "
        f"{config.grid} leave no scene for the {split} split; use more colors or shapes"
    )


def _split_of(cells: tuple[Cell, ...], seed: int) -> Split:
    digest = blake2b(repr((seed, cells)).encode(), digest_size=4).digest()
    return "validation" if int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**32 else "train"


def _one_hop(
    cells: tuple[Cell, ...], config: ShapesConfig, source: random.Random
) -> dict[str, list[Question]]:
    """Return questions by tag, without empty tags."""
    questions: dict[str, list[Question]] = {
        tag: [] for tag in ("color", "shape", "place", "count", "compare")
    }
    for place, cell in zip(_place_names(config.grid), cells, strict=True):
        if cell is None:
            continue
        questions["color"].append(Question(f"what color {place} ?", cell[0], "color"))
        questions["shape"].append(Question(f"what shape {place} ?", cell[1], "shape"))
        if cells.count(cell) == 1:
            questions["place"].append(Question(f"where {cell[0]} {cell[1]} ?", place, "place"))
    counts = dict.fromkeys(list(COLORS)[: config.colors], 0)
    for cell in cells:
        if cell is not None:
            counts[cell[0]] += 1
    by_count: dict[int, list[str]] = {}
    for color, count in counts.items():
        by_count.setdefault(count, []).append(color)
    for count, colors in by_count.items():  # one color per number, so that no number is frequent
        questions["count"].append(
            Question(f"how many {source.choice(colors)} ?", NUMBERS[count], "count")
        )
    more = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    if more:  # one yes and one no; ties are as frequent among no as in the scene
        a, b = source.choice(more)
        questions["compare"].append(Question(f"more {a} than {b} ?", "yes", "compare"))
        not_more = [(a, b) for a in counts for b in counts if a != b and counts[a] <= counts[b]]
        a, b = source.choice(not_more)
        questions["compare"].append(Question(f"more {a} than {b} ?", "no", "compare"))
    return {tag: items for tag, items in questions.items() if items}


def _two_hop(cells: tuple[Cell, ...], config: ShapesConfig) -> dict[str, list[Question]]:
    """Return questions by tag: find the only cell with the named shape, then read another cell."""
    questions: dict[str, list[Question]] = {}
    for index, cell in enumerate(cells):
        if cell is None or cells.count(cell) > 1:
            continue
        for relation, other in _neighbours(index, config).items():
            target = cells[other]
            if target is None:
                continue
            for attribute, answer in zip(("color", "shape"), target, strict=True):
                text = f"what {attribute} {relation} {cell[0]} {cell[1]} ?"
                tag = f"{attribute}_{relation}"
                questions.setdefault(tag, []).append(Question(text, answer, tag))
    return questions


def _neighbours(index: int, config: ShapesConfig) -> dict[str, int]:
    """Return relation word -> index of the related cell, for `config.relations` relations."""
    row, column = divmod(index, config.grid)
    neighbours = {}
    if config.grid == 2:
        neighbours = {"beside": index ^ 1, "vertical": index ^ 2, "opposite": index ^ 3}
    else:
        if column + 1 < config.grid:
            neighbours["right"] = index + 1
        if row + 1 < config.grid:
            neighbours["below"] = index + config.grid
    return dict(list(neighbours.items())[: config.relations])


@cache
def _sprite(color: str, shape: str, side: int) -> np.ndarray:
    """Return a shape on black, uint8 [side, side, 3], anti-aliased by 4x supersampling."""
    ticks = (np.arange(4 * side) + 0.5) / (2 * side) - 1.0
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    radius = np.hypot(x, y)
    inside = {
        "circle": radius <= 1.0,
        "square": np.ones_like(x, dtype=bool),
        "triangle": np.abs(x) <= (y + 1.0) / 2,
        "cross": (np.abs(x) <= 0.25) | (np.abs(y) <= 0.25),
        "diamond": np.abs(x) + np.abs(y) <= 1.0,
        "ring": (radius <= 1.0) & (radius >= 0.55),
    }[shape]
    coverage = inside.reshape(side, 4, side, 4).mean(axis=(1, 3))
    return (coverage[..., None] * np.array(COLORS[color])).astype(np.uint8)
