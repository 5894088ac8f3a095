"""Candidate tasks, their embedding and the choice among them, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.selection import COLORS, color_encoder, color_recipe, color_store

from fmray.config.fewshot import FewshotRecipe
from fmray.data.image_store import ImageStore
from fmray.selection import TaskMoments, select_tasks
from fmray.train.fewshot import encoder as embedding
from fmray.train.fewshot import select as selection
from fmray.train.fewshot.encoder import Embedder, open_pool
from fmray.train.fewshot.select import candidate_tasks, choose, embed_tasks, select_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return color_store(tmp_path_factory.mktemp("colors"))


def recipe_of(store: ImageStore, **sections: object) -> FewshotRecipe:
    return color_recipe(store, store.path.parent, **sections).recipe


def test_each_collection_but_the_target_is_a_task(store):
    recipe = recipe_of(store)
    tasks = {task.name: task for task in candidate_tasks(store, recipe, recipe.target)}
    assert set(tasks) == set(COLORS) - {"target"}
    train = store.select("sea", "train")
    np.testing.assert_array_equal(tasks["sea"].rows, train.rows)
    np.testing.assert_array_equal(tasks["sea"].labels, train.labels)
    assert {task.name for task in candidate_tasks(store, recipe, None)} == set(COLORS)
    named = recipe_of(store, select={"candidates": ["target", "moss"]})
    assert [task.name for task in candidate_tasks(store, named, named.target)] == ["target", "moss"]


def test_groups_of_classes_partition_the_train_classes(store):
    recipe = recipe_of(store, select={"tasks": "classes", "classes_per_task": 3})
    tasks = candidate_tasks(store, recipe, recipe.target)
    assert len(tasks) == 8 and len({task.name for task in tasks}) == 8
    groups = [task for task in tasks if task.name.startswith("moss/")]
    assert [len(np.unique(task.labels)) for task in groups] == [3, 3]
    rows = np.concatenate([task.rows for task in groups])
    np.testing.assert_array_equal(np.sort(rows), store.select("moss", "train").rows)


def test_episodes_as_tasks_alternate_between_collections_and_ignore_the_target(store):
    changes = {"tasks": "episodes", "episodes": 10}
    recipe = recipe_of(store, select=changes)
    tasks = candidate_tasks(store, recipe, recipe.target)
    assert [task.name.split("/")[0] for task in tasks] == [
        *("crimson", "moss", "scarlet", "sea") * 2,
        *("crimson", "moss"),
    ]
    for task in tasks:
        assert len(np.unique(task.rows)) == 3 * (1 + 4)
        assert np.unique(task.labels, return_counts=True)[1].tolist() == [5, 5, 5]
    others = {task.name: task for task in candidate_tasks(store, recipe, None)}
    np.testing.assert_array_equal(tasks[1].rows, others["moss/0000"].rows)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"episodes": {"ways": 7, "shots": 1, "queries": 1}},
            "no candidate tasks: .* 7-way episode; lower episodes.ways",
        ),
        (
            {"episodes": {"queries": 12}, "select": {"candidates": ["sea"]}},
            "sea cannot be a candidate: 0 of its 6 train classes have 13 images",
        ),
        (
            {"select": {"tasks": "classes", "classes_per_task": 2}},
            "select.classes_per_task: 2 classes form no 3-way episode",
        ),
        ({"select": {"candidates": ["lava"]}}, "no collection 'lava'"),
    ],
)
def test_unusable_candidates_are_errors(store, sections, message):
    recipe = recipe_of(store, **sections)
    with pytest.raises(ValueError, match=message):
        candidate_tasks(store, recipe, recipe.target)


def test_embedding_in_chunks_matches_algorithm_1_on_all_features(store, monkeypatch):
    monkeypatch.setattr(embedding, "EMBED_CHUNK", 7)
    monkeypatch.setattr(embedding, "BATCH", 3)
    recipe, encoder = recipe_of(store), color_encoder()
    embedded = embed_tasks(recipe, store, encoder, recipe.target)
    monkeypatch.undo()
    embedder = Embedder(store, None, encoder)
    moments = []
    for name in ("crimson", "moss", "scarlet", "sea"):
        images = store.select(name, "train")
        used = np.concatenate([images.rows[images.labels == c][:10] for c in range(6)])
        features = embedder.features(used)
        moments.append(TaskMoments.of(name, features))
        by_class = features.reshape(6, 10, 12).astype(float).mean(axis=1)
        np.testing.assert_allclose(embedded.centroids[name], by_class, rtol=1e-12)
    test_rows = store.select("target", "test").rows
    drawn = np.random.default_rng(np.random.SeedSequence([3, selection.TARGET])).permutation(36)[
        :30
    ]
    target = TaskMoments.of("target", embedder.features(test_rows[drawn]))
    expected = select_tasks(target, moments, recipe.select.threshold)
    assert embedded.choice.names == expected.names
    assert embedded.choice.order == expected.order
    assert embedded.choice.coverage == pytest.approx(expected.coverage, rel=1e-9)
    assert set(embedded.choice.order[:2]) == {"crimson", "scarlet"}
    # for LEEP and LogME: five labelled images of each of the three test classes
    assert np.unique(embedded.labels, return_counts=True)[1].tolist() == [5, 5, 5]


def test_known_candidates_are_not_embedded_again(store, monkeypatch):
    recipe, encoder, known = recipe_of(store), color_encoder(), {}
    first = embed_tasks(recipe, store, encoder, recipe.target, known)
    embedded: list[int] = []
    features = embedding.Embedder.features

    def counted(self, rows):
        embedded.append(len(rows))
        return features(self, rows)

    monkeypatch.setattr(embedding.Embedder, "features", counted)
    again = embed_tasks(recipe, store, encoder, recipe.target, known)
    assert again.choice == first.choice
    assert sum(embedded) == 30 + 15
    other = recipe.target.model_copy(update={"collection": "sea"})
    assert set(embed_tasks(recipe, store, encoder, other, known).choice.order) == {
        "crimson",
        "moss",
        "scarlet",
        "target",
    }


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("all", 4),
        ("no_consistency", 4),
        ("no_diversity", 1),
        ("random", 2),
        ("top_k", 2),
        ("leep", 2),
        ("logme", 2),
    ],
)
def test_baselines_choose_the_expected_number_of_tasks(store, method, count):
    recipe = recipe_of(store, select={"k": 2})
    embedded = embed_tasks(recipe, store, color_encoder(), recipe.target)
    chosen = choose(recipe, store, color_encoder(), recipe.target, method, 0, embedded)
    assert len(chosen.names) == count
    assert [task.name for task in chosen.tasks] == chosen.names
    assert list(chosen.similarity) == chosen.order
    if method == "top_k":
        assert chosen.names == chosen.order[:2]


def test_selection_job_writes_the_table_and_two_plots(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selection, "load_encoder", lambda settings: color_encoder())
    selected = select_run(color_recipe(store, tmp_path), "run")
    out = tmp_path / "run" / "selection"
    assert sorted(path.name for path in out.iterdir()) == [
        "coverage.png",
        "similarity.png",
        "tasks.parquet",
    ]
    table = pq.read_table(out / "tasks.parquet").to_pylist()
    assert [row["task"] for row in table] == selected.order
    assert [row["task"] for row in table if row["selected"]] == selected.names
    assert [row["coverage"] for row in table] == selected.coverage
    assert all((row["classes"], row["images"]) == (6, 72) for row in table)
    for name in ("coverage.png", "similarity.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 200
    printed = capsys.readouterr().out
    assert f"* {selected.order[0]}" in printed
    assert f"{len(selected.names)} of 4 tasks" in printed


def test_missing_target_and_empty_tasks_are_errors(store, tmp_path):
    loaded = color_recipe(store, tmp_path)
    loaded = type(loaded)(loaded.recipe.model_copy(update={"target": None}), loaded.origins)
    with pytest.raises(ValueError, match=r"target: set target.collection"):
        select_run(loaded, "run")
    with (
        open_pool(store, color_encoder(), loaded.recipe.cluster) as pool,
        pytest.raises(ValueError, match="task 'nothing' has no images"),
    ):
        pool.task_features([("nothing", np.empty(0, dtype=int), np.empty(0, dtype=int))])


def test_similar_real_domains_are_selected_first(real_data: Path, tmp_path: Path) -> None:
    """Photographs are closer to paintings and textures than to handwritten digits.

    Even mean colours show that.
    """
    from support.images import image_recipe, prepare_here

    names = ("pacs_photo", "pacs_art_painting", "pacs_sketch", "mnist", "dtd")
    collections = {name: real_data / "images" / f"{name}.parquet" for name in names}
    recipe = image_recipe(tmp_path / "store", collections)
    prepare_here(recipe)
    store = ImageStore.open(recipe.images.store)
    recipe = recipe_of(
        store,
        target={"collection": "pacs_photo", "split": "all"},
        select={"images_per_class": 20},
    )
    order = embed_tasks(recipe, store, color_encoder(), recipe.target).choice.order
    assert set(order) == set(names[1:])
    assert set(order[:2]) == {"pacs_art_painting", "dtd"}
    assert order[-1] == "mnist"
