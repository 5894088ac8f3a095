"""Generated shapes: the answers are right, the splits share no scene, records are reproducible."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fmray.config import ShapesConfig
from fmray.data import shapes
from fmray.data.records import find_bad_rows

CONFIGS = {
    "default": ShapesConfig(),
    "holes": ShapesConfig(empty=0.3, turns=6),
    "three": ShapesConfig(grid=3, colors=8, shapes=6, image_size=48, turns=8, two_hop=0.7),
    "repeats": ShapesConfig(grid=4, colors=3, shapes=2, image_size=40, turns=16, empty=0.2),
    "smallest": ShapesConfig(colors=2, shapes=2, image_size=16, turns=16),
}


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS += ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ShapesConfig:
    """Easy and difficult settings."""
    return CONFIGS[request.param]


def read_scene(image: np.ndarray, grid: int) -> list[tuple[str, str] | None]:
    """Return the (color, shape) of each cell, without knowing how the image was drawn."""
    side = len(image) // grid
    scene: list[tuple[str, str] | None] = []
    for row in range(grid):
        for column in range(grid):
            cell = image[row * side : (row + 1) * side, column * side : (column + 1) * side]
            if not cell.any():
                scene.append(None)
                continue
            brightest = cell.reshape(-1, 3)[cell.sum(axis=2).argmax()].astype(int)
            distance = {c: abs(np.array(rgb) - brightest).sum() for c, rgb in shapes.COLORS.items()}
            scene.append((min(distance, key=distance.__getitem__), read_shape(cell.max(axis=2))))
    return scene


def read_shape(cell: np.ndarray) -> str:
    """Return the shape in a cell, from the coverage of a few points of its bounding box."""
    rows, columns = np.flatnonzero(cell.any(axis=1)), np.flatnonzero(cell.any(axis=0))
    box = cell[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / cell.max()
    middle, last = len(box) // 2, len(box) - 1
    if box[0, 0] > 0.9:
        return "square"
    if box[middle, middle] < 0.5:
        return "ring"
    if box[last].mean() > 0.8:
        return "triangle"
    diagonal = box[last // 4, last // 4]  # inside a circle, on the edge of a diamond
    return "circle" if diagonal > 0.9 else "diamond" if diagonal > 0 else "cross"


def oracle(question: str, cells: list[tuple[str, str] | None], grid: int) -> list[str]:
    """Return all right answers by trying every cell; a good question has exactly one."""
    corner = {"topleft": (0, 0), "topright": (0, 1), "bottomleft": (1, 0), "bottomright": (1, 1)}
    at = {divmod(index, grid): cell for index, cell in enumerate(cells)}
    place = corner if grid == 2 else {f"r{r + 1}c{c + 1}": (r, c) for r, c in at}
    match question.removesuffix(" ?").split():
        case ["how", "many", color]:
            return [NUMBERS[sum(cell is not None and cell[0] == color for cell in cells)]]
        case ["more", first, "than", second]:
            count = Counter(cell[0] for cell in cells if cell is not None)
            return ["yes" if count[first] > count[second] else "no"]
        case ["where", color, shape]:
            return [name for name, where in place.items() if at[where] == (color, shape)]
        case ["what", attribute, name]:
            cell = at[place[name]]
            return [] if cell is None else [cell[("color", "shape").index(attribute)]]
        case ["what", attribute, relation, color, shape]:
            moves = {
                "beside": lambda r, c: (r, 1 - c),
                "vertical": lambda r, c: (1 - r, c),
                "opposite": lambda r, c: (1 - r, 1 - c),
                "right": lambda r, c: (r, c + 1),
                "below": lambda r, c: (r + 1, c),
            }
            answers = []
            for where, cell in at.items():
                if cell == (color, shape):
                    target = at.get(moves[relation](*where))
                    answers.append(
                        "nothing" if target is None else target["cs".index(attribute[0])]
                    )
            return answers
    raise AssertionError(f"unknown question {question!r}")


def test_every_answer_is_the_only_right_one(config: ShapesConfig) -> None:
    kinds = set()
    for index in range(300):
        image, conversation, tags = shapes.make_record(3, "train", index, config)
        assert image.shape == (config.image_size, config.image_size, 3)
        cells = read_scene(image, config.grid)
        questions = [turn["value"] for turn in conversation[::2]]
        assert questions[0].startswith("<image>\n")
        questions[0] = questions[0].removeprefix("<image>\n")
        assert len(set(questions)) == len(questions) == len(tags) >= 1
        for question, answer in zip(questions, conversation[1::2], strict=True):
            assert oracle(question, cells, config.grid) == [answer["value"]], (question, cells)
        kinds |= set(tags)
    # four cells with all four pairs have as many of one color as of the other
    comparable = set() if config is CONFIGS["smallest"] else {"compare"}
    assert {"color", "shape", "place", "count"} | comparable <= kinds
    assert any("_" in tag for tag in kinds)


def test_splits_share_no_scene(config: ShapesConfig) -> None:
    still = config.model_copy(update={"jitter": 0})  # so the image identifies the scene

    def scenes(split: shapes.Split, count: int) -> set[bytes]:
        records = (shapes.make_record(3, split, index, still) for index in range(count))
        return {image.tobytes() for image, _, _ in records}

    assert not scenes("train", 2000) & scenes("validation", 200)


def test_two_hop_share_and_balance_of_answers() -> None:
    for share in (0.0, 0.4, 1.0):
        config = ShapesConfig(two_hop=share, turns=2)
        tags, answers = [], Counter()
        for index in range(1500):
            _, conversation, record_tags = shapes.make_record(1, "train", index, config)
            tags += record_tags
            for tag, answer in zip(record_tags, conversation[1::2], strict=True):
                if tag == "compare":
                    answers[answer["value"]] += 1
        measured = sum("_" in tag for tag in tags) / len(tags)
        assert abs(measured - share) <= 4 * np.sqrt(share * (1 - share) / len(tags))
        if share < 1:
            assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_record_depends_only_on_seed_split_and_index() -> None:
    config = ShapesConfig()
    record = shapes.make_record(5, "train", 7, config)
    for index in range(5):
        shapes.make_record(5, "validation", index, config)
    again = shapes.make_record(5, "train", 7, config)
    assert (record[0] == again[0]).all() and record[1:] == again[1:]
    assert shapes.make_record(6, "train", 7, config)[1] != record[1]


def test_folder_has_llava_format_and_is_written_once(tmp_path: Path) -> None:
    config = ShapesConfig(pictures=30, validation_pictures=5)
    for name in ("a", "b"):
        shapes.generate(tmp_path / name, config, seed=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 30 + 5 + 3
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    for split, count in (("train", 30), ("validation", 5)):
        records = json.loads((tmp_path / "a" / f"{split}.json").read_text())
        assert len(records) == count and not find_bad_rows(tmp_path, records)
        assert all((tmp_path / "a" / record["image"]).is_file() for record in records)
    before = (tmp_path / "a" / "train.json").stat().st_mtime_ns
    shapes.generate(tmp_path / "a", config, seed=4)
    assert (tmp_path / "a" / "train.json").stat().st_mtime_ns == before
    shapes.generate(tmp_path / "a", config, seed=5)
    assert (tmp_path / "a" / "train.json").read_bytes() != (
        tmp_path / "b" / "train.json"
    ).read_bytes()


def test_wrong_folder_and_sizes_are_errors(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not made by the shapes generator"):
        shapes.generate(tmp_path / "full", ShapesConfig(pictures=1), seed=0)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"image_size: 16 gives 4 pixels a cell; .* at least 24"):
        shapes.generate(tmp_path / "small", ShapesConfig(grid=4, image_size=16), seed=0)
