"""Spaces: equal trials, warm starts, and one-line errors for wrong spaces and options."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.selection import color_recipe, color_store

from fmray.commands.config import schema
from fmray.config import AdaLlavaRecipe, load
from fmray.config.fewshot import FewshotRecipe
from fmray.config.search import SearchRecipe
from fmray.search import space as space_module
from fmray.search.space import (
    Choice,
    Integer,
    Real,
    Space,
    Subset,
    Tasks,
    WarmStart,
    load_space,
    override,
)
from fmray.selection import selected_count
from fmray.train.fewshot.select import choose_for_run

FEWSHOT = FewshotRecipe.model_validate({"name": "few", "target": {"collection": "mnist"}})
ADAPTIVE = AdaLlavaRecipe.model_validate({"name": "adaptive", "adaptive": {}})
# worked example of the coverage rule (dissertation): {A, B} for 0 <= p < 12, {A} above
TASKS = Tasks(["A", "B"], ["A", "B", "C", "D"], [0.97, 0.89, 0.0, -1.0], [1, 13, 143 / 57, 2])


def subsets(**options: object) -> Space:
    return load_space("task_subsets", FEWSHOT, options, lambda: TASKS)


@given(st.lists(st.sampled_from("ABCD"), min_size=1, max_size=8), st.randoms())
def test_equal_subsets_have_equal_keys_in_any_order_and_type(
    items: list[str], shuffle: random.Random
) -> None:
    space = subsets()
    shuffled = list(dict.fromkeys(items))
    shuffle.shuffle(shuffled)
    key = space.key({"tasks": items})
    assert key == space.key({"tasks": tuple(shuffled)}) == space.key({"tasks": set(items)})
    others = [set(c) for n in range(1, 5) for c in itertools.combinations("ABCD", n)]
    keys = {space.key({"tasks": other}) for other in others}
    assert len(keys) == 15 and key in keys


def test_task_subsets_start_with_algorithm_1_all_tasks_and_each_single_task() -> None:
    for which in ("any", "prefix", "threshold"):
        space = subsets(subsets=which)
        starts = {start.name: set(start.values["tasks"]) for start in space.warm_starts}
        assert starts == {
            "Algorithm 1": {"A", "B"},
            "all tasks": {"A", "B", "C", "D"},
            **{f"only {name}": {name} for name in "ABCD"},
        }
        assert [start.name for start in space.warm_starts][:2] == ["Algorithm 1", "all tasks"]
    assert len(subsets(singles=1).warm_starts) == 3
    assert len(list(subsets().points())) == 15


@given(st.lists(st.floats(0.1, 10) | st.just(float("inf")), min_size=1, max_size=7))
def test_threshold_subsets_are_those_of_a_scan_over_thresholds(coverage: list[float]) -> None:
    names = [f"t{i}" for i in range(len(coverage))]
    tasks = Tasks(names[:1], names, [0.0] * len(names), coverage)
    space = load_space(
        "task_subsets", FEWSHOT, {"subsets": "threshold", "singles": 0}, lambda: tasks
    )
    counts_of_space = {len(point["tasks"]) for point in space.points()} - {len(names)}
    ratios = [b / a - 1 for a, b in itertools.pairwise(coverage)]
    scan = [0.0, 1e9, *(p + e for p in ratios if 0 <= p < 1e8 for e in (-1e-7, 1e-7, 0))]
    counts = {selected_count(coverage, p) for p in scan if p >= 0}
    # one task (Algorithm 1's choice here) and all tasks are warm starts, so always included
    assert counts_of_space | {1, len(names)} == counts | {1, len(names)}


def test_the_base_recipe_is_the_warm_start_if_it_is_inside_the_space() -> None:
    """With design layers, whatever the unit: it has no effect there."""
    [start] = load_space("budgets", ADAPTIVE, {"unit": [2, 4]}).warm_starts
    assert start.name == "the base recipe" and start.values["train.lr"] == ADAPTIVE.train.lr
    heads = AdaLlavaRecipe.model_validate({"name": "a", "adaptive": {"design": "heads", "unit": 8}})
    assert load_space("budgets", heads, {"unit": [2, 4]}).warm_starts == ()
    assert len(load_space("budgets", heads, {}).warm_starts) == 1


def test_settings_without_effect_do_not_distinguish_trials() -> None:
    space = load_space(
        "budgets",
        ADAPTIVE,
        dict.fromkeys(("lr", "scheduler_lr", "tau", "latency_token")),
    )
    layers = {space.key({"adaptive.design": "layers", "adaptive.unit": unit}) for unit in (4, 8)}
    heads = {space.key({"adaptive.design": "heads", "adaptive.unit": unit}) for unit in (4, 8)}
    assert len(layers) == 1 and len(heads) == 2 and not layers & heads


def test_shares_matter_among_the_chosen_tasks_only() -> None:
    space = subsets(weights=[1, 2, 4])
    space.check()

    def key(tasks: str, *shares: int) -> str:
        return space.key(
            {"tasks": tuple(tasks)}
            | {f"share of {name}": share for name, share in zip("ABCD", shares, strict=True)}
        )

    assert key("A", 1, 2, 4, 1) == key("A", 4, 1, 1, 1) == subsets().key({"tasks": ("A",)})
    assert key("AB", 1, 2, 1, 1) == key("BA", 2, 4, 4, 2) != key("AB", 2, 1, 1, 1)
    assert key("AB", 2, 2, 1, 1) == key("AB", 1, 1, 1, 1) == subsets().key({"tasks": ("A", "B")})
    assert '"select.weights={A: 1, B: 2}"' in key("AB", 1, 2, 1, 1)
    assert len(space.warm_starts) == 6


def test_overrides_load_on_the_base_recipe(tmp_path: Path) -> None:
    adaptive = tmp_path / "a.yaml"
    adaptive.write_text("name: a\nadaptive: {}\nmodel: {lora: {}}\n")
    base = load(adaptive).recipe
    space = load_space(
        "budgets", base, {"first": [1, 4], "min_budget": [0.5, 0.9], "lora_rank": [4, 8]}
    )
    values = {p.name: getattr(p, "values", None) or [p.low] for p in space}
    for row in itertools.product(*values.values()):
        point = dict(zip(values, row, strict=True))
        loaded = load(adaptive, space.to_overrides(point)).recipe
        assert loaded.adaptive is not None and loaded.model.lora is not None
        assert loaded.adaptive.design == point["adaptive.design"]
        assert loaded.adaptive.first == point["adaptive.first"]
        assert loaded.adaptive.min_budget == 0.5 and loaded.train.scheduler_lr == 1e-5
        assert loaded.model.lora.rank == point["model.lora.rank"]
    few = tmp_path / "few.yaml"
    few.write_text("kind: fewshot\nname: few\n")
    space = load_space("fewshot", FEWSHOT, {})
    [start] = space.warm_starts
    loaded = load(few, space.to_overrides(start.values), (FewshotRecipe,))
    assert loaded.recipe.episodes == FEWSHOT.episodes and loaded.recipe.train == FEWSHOT.train
    shares = {"share of cifar10/003": 4, "share of 123": 2}
    texts = subsets().to_overrides({"tasks": ("cifar10/003", "123"), **shares})
    select = load(few, texts, (FewshotRecipe,)).recipe.select
    assert select.only == ("123", "cifar10/003")
    assert select.weights == {"123": 1.0, "cifar10/003": 2.0}


def test_values_survive_json() -> None:
    space = Space(
        (Subset("s", ("x", "y")), Choice("c", ((1, 2), True, 1)), Real("r", 0, 1)), lambda _: []
    )
    values = {"s": ("x", "y"), "c": (1, 2), "r": 0.25}
    assert space.read(json.loads(json.dumps(values))) == values
    assert space.read({**values, "c": 1})["c"] is not True


def plain(*parameters: object, starts: tuple[WarmStart, ...] = ()) -> Space:
    return Space(parameters, lambda values: [override("a.b", 1)], starts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plain(), "the space varies nothing"),
        (plain(Integer("a", 1, 2), Integer("a", 1, 2)), "'a' is listed twice"),
        (plain(Choice("a", ())), "a: has no values to choose from"),
        (plain(Choice("a", (1, 2, 1))), "a: 1 is listed twice; keep one of them"),
        (plain(Integer("a", 3, 2)), "a: runs from 3 down to 2"),
        (plain(Real("a", 1, 1)), "a: runs from 1 to 1; give two finite ends"),
        (plain(Real("a", 0, float("inf"))), "a: runs from 0 to inf; give two finite ends"),
        (plain(Real("a", 0, 1, log=True)), "a: is logarithmic and starts at 0"),
        (plain(Subset("a", ())), "a: has no items"),
        (plain(Subset("a", ("x", "x"))), "a: 'x' is listed twice"),
        (
            plain(Subset("a", ("x",)), starts=(WarmStart("w", {"a": ()}),)),
            "warm start w: a: an empty subset",
        ),
        (
            plain(Subset("a", ("x",)), starts=(WarmStart("w", {"a": ("z",)}),)),
            "warm start w: a: 'z' is not one of x",
        ),
        (plain(Integer("a", 1, 2), starts=(WarmStart("w", {"b": 1}),)), "values of b in a space"),
        (
            Space((Integer("a", 1, 2),), lambda _: ["a"], (WarmStart("w", {"a": 1}),)),
            "write key=VALUE with a dotted key",
        ),
    ],
)
def test_an_invalid_space_is_an_error_of_one_line(wrong: Space, message: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        wrong.check()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "base", "options", "message"),
    [
        ("nothing", FEWSHOT, {}, "tune_spaces/ has no 'nothing'; it has budgets, fewshot, task_"),
        ("../jobs/search", FEWSHOT, {}, "tune_spaces/ has no '../jobs/search'"),
        (
            "fewshot",
            FEWSHOT,
            {"rate": 1},
            "options.rate: there is no such key; the keys here are ways,",
        ),
        ("fewshot", FEWSHOT, {"lr": [1]}, "options.lr"),
        ("fewshot", FEWSHOT, {"ways": ["5"]}, "options.ways.0: should be a valid integer, not '5'"),
        ("fewshot", FEWSHOT, {"lr": [1e-2, 1e-6]}, "train.lr: runs from 0.01 to 1e-06"),
        ("fewshot", FEWSHOT, {"ways": []}, "episodes.ways: has no values"),
        ("fewshot", ADAPTIVE, {}, "varies recipes of kind fewshot; the base is of kind adallava"),
        ("budgets", FEWSHOT, {}, "varies recipes of kind adallava; the base is of kind fewshot"),
        ("budgets", AdaLlavaRecipe(name="a"), {}, "the base recipe has adaptive: null"),
        ("budgets", ADAPTIVE, {"lora_rank": [4]}, "options.lora_rank: the base recipe has no"),
        ("task_subsets", FEWSHOT, {}, "it varies tasks, and there are no tasks"),
        ("task_subsets", ADAPTIVE, {}, "it varies tasks, and there are no tasks"),
    ],
)
def test_invalid_names_options_and_base_recipes_are_errors_of_one_line(
    name, base, options, message
) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        load_space(name, base, options)
    assert message in str(caught.value)


def test_a_file_that_defines_no_space_is_an_error(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "fmray" / "search"
    (tmp_path / "tune_spaces").mkdir()
    (tmp_path / "tune_spaces" / "mine.py").write_text("Options = None\n")
    monkeypatch.setattr(space_module, "__file__", str(package / "space.py"))
    with pytest.raises(ValueError, match=r"tune_spaces/mine\.py defines no `space`"):
        load_space("mine", FEWSHOT, {})


def test_a_run_trains_on_the_tasks_of_select_only(tmp_path: Path) -> None:
    store = color_store(tmp_path)
    recipe = color_recipe(store, tmp_path).recipe

    def only(*names: str) -> FewshotRecipe:
        select = recipe.select.model_copy(update={"only": names})
        return recipe.model_copy(update={"select": select})

    first, second = (task for task in _all_tasks(recipe, tmp_path)[:2])
    assert choose_for_run(only(second, first), tmp_path / "some.json") == [second, first]
    with pytest.raises(ValueError, match=r"select\.only: there is no candidate task 'none'; there"):
        choose_for_run(only("none"), tmp_path / "none.json")
    select = recipe.select.model_copy(update={"method": "all", "weights": {"none": 2.0}})
    with pytest.raises(ValueError, match=r"select\.weights: there is no candidate task 'none'"):
        choose_for_run(recipe.model_copy(update={"select": select}), tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"select\.only: 'a' is listed twice"):
        FewshotRecipe.model_validate({"name": "a", "select": {"only": ["a", "a"]}})


def _all_tasks(recipe: FewshotRecipe, folder: Path) -> list[str]:
    select = recipe.select.model_copy(update={"method": "all"})
    return choose_for_run(recipe.model_copy(update={"select": select}), folder / "all.json")


def test_search_recipes_load_and_fit_the_schema(tmp_path: Path) -> None:
    right = {"kind": "search", "name": "s", "base": "a.yaml", "space": "budgets"}
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate({**right, "options": {"tau": [1, 2]}}, schema())
    for wrong in ({"trials": 0}, {"train": {"lr": 1}}, {"algorithm": "bayes"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**right, **wrong}, schema())
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(right | {"algorithm": "nsga2"}))
    with pytest.raises(ValueError, match=r"algorithm: nsga2 is for several objectives; use tpe"):
        load(path, (), (SearchRecipe,))
