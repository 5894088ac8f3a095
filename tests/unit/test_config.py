"""Recipes: which files load, the error of those that do not, and the origins of values."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fmray.commands.config import schema
from fmray.config import KINDS, AdaLlavaRecipe, ConfigError, load
from fmray.config.arguments import job_arguments, job_path

RECIPES = sorted(job_path("recipes").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Wrong recipes: text, line of the mistake (None: the file) and a part of the message.
WRONG = {
    "empty": ("", None, "the recipe is empty; it needs at least `name:`"),
    "only a comment": ("# nothing\n", None, "the recipe is empty"),
    "a list": ("- name: a\n", 1, "a recipe is a mapping of `key: value` lines, not a list"),
    "a word": ("name\n", 1, "not the value 'name'"),
    "not yaml": ("name: a\ntrain: [1, 2\nseed: 3\n", 3, "not valid YAML"),
    "tab": ("name: a\ntrain:\n\tlr: 1\n", 3, "not valid YAML"),
    "control character": ("name: a\x00\n", None, "not valid YAML"),
    "tag": ("name: !!python/object:os.system a\n", 1, "not valid YAML"),
    "alias": ("name: &a b\nmodel: *a\n", 2, "aliases are not allowed"),
    "too deep": ("name: " + "[" * 50 + "]" * 50, 1, "nested more than 20 deep"),
    "number as key": ("name: a\n3: 4\n", 2, "the key 3 is not a name"),
    "duplicate": (
        "name: a\ntrain:\n  lr: 1\n  lr: 2\n",
        4,
        "lr is written twice (first in line 3)",
    ),
    "no name": ("seed: 3\n", None, "name: is missing"),
    "bad name": ("name: a/b\n", 1, "name: should match"),
    "unknown": (
        "name: a\ntrain:\n  lrr: 1\n",
        3,
        "train.lrr: there is no such key; did you mean train.lr?",
    ),
    "unknown elsewhere": (
        "name: a\ntrain:\n  workers: 2\n",
        3,
        "train.workers: there is no such key; did you mean cluster.workers?",
    ),
    "unknown everywhere": (
        "name: a\nzzz: 1\n",
        2,
        "zzz: there is no such key; the keys here are kind, name,",
    ),
    "text for a number": (
        "name: a\ntrain:\n  lr: fast\n",
        3,
        "train.lr: should be a valid number, not fast",
    ),
    "quoted number": ('name: a\nseed: "3"\n', 2, "seed: should be a valid integer, not '3'"),
    "true for a number": (
        "name: a\ntrain: {steps: true}\n",
        2,
        "train.steps: should be a valid integer, not true",
    ),
    "not finite": ("name: a\ntrain: {lr: .nan}\n", 2, "train.lr: should be a finite number"),
    "negative": ("name: a\ntrain: {lr: -1}\n", 2, "train.lr: should be greater than 0, not -1"),
    "number for a section": ("name: a\ntrain: 3\n", 2, "train: should be a mapping of keys, not 3"),
    "null for a section": ("name: a\ntrain:\n", 2, "train: should be a mapping of keys, not null"),
    "mapping for a value": (
        "name: a\nseed: {x: 1}\n",
        2,
        "seed: should be a valid integer, not {x: 1}",
    ),
    "wrong choice": (
        "name: a\nadaptive: {design: layer}\n",
        2,
        "should be 'layers' or 'heads', not layer",
    ),
    "wrong choice in a list": (
        "name: a\nmodel:\n  freeze: [eyes]\n",
        3,
        "model.freeze.0: should be 'vision'",
    ),
    "wrong stage": ("name: a\nzero: {stage: 4}\n", 2, "zero.stage: should be 0, 1, 2 or 3, not 4"),
    "budget above one": (
        "name: a\nevaluate: {budgets: [0.5, 2]}\n",
        2,
        "evaluate.budgets.1: should be less than",
    ),
    "no budget": (
        "name: a\nevaluate: {budgets: []}\n",
        2,
        "evaluate.budgets: should be a list of 1 or more",
    ),
    "one beta": (
        "name: a\ntrain: {betas: [0.9]}\n",
        2,
        "train.betas.1: is missing (the list is too short)",
    ),
    "two mistakes": ("name: a\nseed: x\nzzz: 1\n", 2, "(and 1 more)"),
    "batch does not divide": (
        "name: a\ntrain: {global_batch: 100}\ncluster: {workers: 2}\n",
        2,
        "100 is not a multiple of 2 workers x micro_batch 16 = 32; use 96 or 128",
    ),
    "flash in float32": (
        "name: a\nmodel: {attention: flash_attention_2}\n",
        2,
        "needs model.dtype: bfloat16",
    ),
    "probe with flash": (
        "name: a\nmodel: {attention: flash_attention_2, dtype: bfloat16}\n"
        "adaptive: {latency_token: probe}\n",
        3,
        "adaptive.latency_token: probe needs its own attention mask",
    ),
    "nothing trains": (
        "name: a\nmodel: {freeze: [vision, projector, language]}\n",
        2,
        "nothing trains",
    ),
    "two sources of data": (
        "name: a\ndata: {train: a.json, shapes: {}}\n",
        2,
        "set one of the two to null",
    ),
    "validation alone": ("name: a\ndata: {validation: a.json}\n", 2, "needs data.train too"),
    "offload without stage 3": (
        "name: a\nzero: {offload_parameters: cpu}\n",
        2,
        "needs zero.stage: 3, not 2",
    ),
    "offload at stage 0": (
        "name: a\nzero: {stage: 0, offload_optimizer: cpu}\n",
        2,
        "needs zero.stage: 1, 2 or 3",
    ),
    "key/value heads": (
        "name: a\nmodel: {scratch: {kv_heads: 3}}\n",
        2,
        "should divide heads (4); 3 does not",
    ),
    "hidden": (
        "name: a\nmodel: {scratch: {hidden: 100}}\n",
        2,
        "100 should be a multiple of 2 x heads = 8",
    ),
    "vision heads": (
        "name: a\nmodel: {scratch: {vision_heads: 3}}\n",
        None,
        "64 should be a multiple of vision_heads",
    ),
    "patches": (
        "name: a\nmodel: {scratch: {image_size: 33}}\n",
        2,
        "should be a multiple of patch_size = 16",
    ),
    "no layer to switch": (
        "name: a\nadaptive: {first: 8}\n",
        2,
        "8 leaves no switchable layer; at most 7",
    ),
    "budget below the prefix": (
        "name: a\nadaptive: {min_budget: 0.3}\n",
        2,
        "0.3 is below the cost of the first 4 of 8",
    ),
    "file store": ("name: a\ntracking: {uri: ./mlruns}\n", 2, "MLflow 3 has no file store"),
    "registry without tracking": (
        "name: a\ntracking: {enabled: false, register_as: b}\n",
        2,
        "the model registry needs tracking.enabled: true",
    ),
    "unknown in a list": (
        "kind: fewshot\nname: a\ncompare:\n  targets:\n    - {collection: b}\n    - colection: c\n",
        6,
        "compare.targets.1.colection: there is no such key; did you mean compare.targets.1.coll",
    ),
    "duplicate in a list": (
        "kind: fewshot\nname: a\ncompare:\n  targets:\n    - {split: val, split: test}\n",
        5,
        "split is written twice (first in line 5)",
    ),
    "unknown in a dictionary": (
        "kind: fewshot\nname: a\nimages:\n  collections:\n    b: {pth: c}\n",
        5,
        "images.collections.b.pth: there is no such key; did you mean images.collections.b.path?",
    ),
    "bad name in a dictionary": (
        "kind: fewshot\nname: a\nimages:\n  collections:\n    b c: {path: c}\n",
        5,
        "images.collections.b c: 'b c': letters, digits, `_` and `-` only",
    ),
    "branch of a union": (
        "kind: fewshot\nname: a\nimages:\n  collections:\n    b: {path: c, split: 3}\n",
        5,
        "images.collections.b.split: should be",
    ),
    "tag of a list": ("name: !!python/tuple [a]\n", 1, "the tag tag:yaml.org,2002:python/tuple is"),
    "unknown kind": (
        "kind: fewshoot\nname: a\n",
        1,
        "kind: this needs a recipe of kind: adallava or kind: fewshot",
    ),
    "extends a list": ("extends: [a, b]\nname: a\n", 1, "extends: should name one recipe file"),
    "extends nothing": ("extends: none.yaml\nname: a\n", 1, "extends: there is no file"),
    "extends itself": ("extends: recipe.yaml\nname: a\n", None, "`extends` forms a circle"),
}


@pytest.mark.parametrize(("text", "line", "words"), WRONG.values(), ids=WRONG.keys())
def test_the_error_of_a_wrong_recipe_names_line_key_and_reason(
    tmp_path: Path, text: str, line: int | None, words: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, (), tuple(KINDS.values()))
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.startswith(f"{path}:{line}: " if line else str(path))


def test_unreadable_recipe_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such recipe file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="a folder, not a recipe"):
        load(tmp_path)
    binary = tmp_path / "picture.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"not a text file in UTF-8 \(byte 6\)"):
        load(binary)
    large = write(tmp_path, "name: a\n" + "# filling\n" * 200_000)
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load(large)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "write key=VALUE with a dotted key"),
        ("=3", "write key=VALUE"),
        ("train..lr=3", "write key=VALUE"),
        ("train.lr=[", "not valid YAML"),
        ("train.lr=x", "--set: train.lr: should be a valid number, not x"),
        ("train.lrr=1", "--set: train.lrr: there is no such key; did you mean train.lr?"),
        ("name.first=a", "--set: name: should be a valid string, not {first: a}"),
        ("model.revision=4481e27", "model.revision: should be text, not 4.481e+30; write it in"),
        ("model.revision=0123456", "should be text, not 123456; write it in quotes"),
        ("train.micro_batch=7", "train.global_batch: 128 is not a multiple"),
        ("cluster.workers=[2, 129]", "128 leaves nothing for some of 129 workers; use 129 or more"),
        ("extends=a.yaml", "--set: extends: there is no such key"),
    ],
)
def test_wrong_overrides_are_errors(tmp_path: Path, override: str, words: str) -> None:
    path = write(tmp_path, "name: a\n")
    with pytest.raises(ConfigError) as caught:
        load(path, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    path = write(tmp_path, "name: on\ntrain: {lr: 1e-5, weight_decay: 1}\nseed: 010\n")
    recipe = load(path, ["train.scheduler_lr=5E-4", "tracking.experiment=2024-01-01"]).recipe
    assert recipe.name == "on"
    assert recipe.train.lr == 1e-5
    assert recipe.train.scheduler_lr == 5e-4
    assert recipe.train.weight_decay == 1.0
    assert recipe.seed == 10
    assert recipe.tracking.experiment == "2024-01-01"


def test_parents_merge_and_keep_their_origins(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    root = write(
        tmp_path / "base",
        "name: root\nadaptive: {first: 2}\ntrain:\n  lr: 1.0\n  betas: [0.1, 0.2]\n",
    )
    middle = write(tmp_path, "extends: base/recipe.yaml\ntrain:\n  lr: 2.0\n", "middle.yaml")
    leaf = write(
        tmp_path, "extends: middle.yaml\nname: leaf\ntrain: {betas: [0.3, 0.4]}\n", "leaf.yaml"
    )
    loaded = load(leaf, ["train.steps=5", "adaptive.tau=2"])
    recipe = loaded.recipe
    assert (recipe.name, recipe.train.lr, recipe.train.steps) == ("leaf", 2.0, 5)
    assert recipe.train.betas == (0.3, 0.4)
    assert recipe.adaptive is not None
    assert (recipe.adaptive.first, recipe.adaptive.tau) == (2, 2.0)
    expected = {
        "name": f"{leaf}:2",
        "train.lr": f"{middle}:3",
        "train.betas": f"{leaf}:3",
        "train.steps": "--set",
        "train.epochs": "default",
        "adaptive.first": f"{root}:2",
        "adaptive.tau": "--set",
    }
    assert {key: loaded.origins[key] for key in expected} == expected
    assert load(leaf, ["adaptive=null"]).recipe.adaptive is None
    assert f"  lr: 2.0  # {middle}:3\n" in loaded.dump()


def test_two_recipes_that_extend_each_other_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"circle: a.yaml -> b.yaml -> a.yaml"):
        load(tmp_path / "a.yaml")


def test_every_value_has_an_origin(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "name: a\ndata: {shapes: {}}\n"))
    leaves = set()

    def walk(values: dict, prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                leaves.add(prefix + key)

    walk(loaded.recipe.model_dump(), "")
    assert set(loaded.origins) == leaves


NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,20}\Z")
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20
)
RECIPE_VALUES = st.fixed_dictionaries(
    {
        "name": NAMES,
        "seed": st.integers(0, 2**63),
        "train": st.fixed_dictionaries(
            {
                "lr": st.floats(1e-300, 1e300),
                "betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
                "steps": st.none() | st.integers(1, 10**9),
                "gradient_checkpointing": st.booleans(),
            }
        ),
        "adaptive": st.none() | st.fixed_dictionaries({"tau": st.floats(0.1, 1e6)}),
        "evaluate": st.fixed_dictionaries(
            {"budgets": st.lists(st.floats(0.01, 1), min_size=1, max_size=4)}
        ),
        "tracking": st.fixed_dictionaries({"experiment": TEXT, "register_as": st.none() | TEXT}),
        "data": st.fixed_dictionaries({"image_folder": st.none() | TEXT.map("x".__add__)}),
    }
)


@given(values=RECIPE_VALUES)
@settings(max_examples=60, deadline=None)
def test_dump_loads_as_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, values: dict
) -> None:
    folder = tmp_path_factory.mktemp("dump")
    first = load(write(folder, json.dumps(values, ensure_ascii=False)))
    assert first.recipe == AdaLlavaRecipe.model_validate(values)
    again = load(write(folder, first.dump(), "again.yaml"))
    assert again.recipe == first.recipe


@given(text=st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_text_loads_or_is_a_config_error_of_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = ""
    try:
        load(path)
    except ConfigError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_load_and_match_the_schema(path: Path) -> None:
    loaded = load(path, (), tuple(KINDS.values()))
    jsonschema.validate(yaml.safe_load(path.read_text()), schema())
    assert loaded.recipe.name


def test_the_schema_rejects_what_the_loader_rejects() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "a", "train": {"lrr": 1}}, schema())
    with pytest.raises(jsonschema.ValidationError):  # a key of another kind
        jsonschema.validate({"name": "a", "kind": "fewshot", "zero": {"stage": 1}}, schema())
    jsonschema.validate({"extends": "b.yaml"}, schema())
    jsonschema.validate({"kind": "fewshot", "episodes": {"ways": 5}}, schema())


def test_the_batch_need_not_divide_over_a_changing_number_of_workers() -> None:
    train = {"global_batch": 100, "micro_batch": 8}
    recipe = AdaLlavaRecipe.model_validate(
        {"name": "a", "train": train, "cluster": {"workers": [3, 7]}}
    )
    assert list(recipe.cluster.world_sizes) == [3, 4, 5, 6, 7]


def test_conflicts_are_errors_without_a_file_too() -> None:
    with pytest.raises(ValidationError, match=r"train.global_batch: 100 is not a multiple"):
        AdaLlavaRecipe.model_validate({"name": "a", "train": {"global_batch": 100}})


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://AKIA:hidden@bucket/prefix", "credentials do not belong in a recipe"),
        ("s3://bucket/prefix?secret_key=hidden", "credentials do not belong in a recipe"),
        ("abfs://box:hidden@account.dfs.core.windows.net/x", "credentials do not belong"),
        ("s3:///prefix", "should be s3://BUCKET/PREFIX"),
        ("s3://bucket?endpoint=host", "should be s3://BUCKET/PREFIX"),
        ("runs", "or an absolute path, not runs"),
    ],
)
def test_a_mirror_is_a_store_without_credentials(tmp_path: Path, uri: str, words: str) -> None:
    path = write(tmp_path, f"name: a\ncluster:\n  mirror: {uri}\n")
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:3: cluster.mirror: ")
    assert words in str(error.value) and "hidden" not in str(error.value)
    for right in ("s3://b/p?region=eu-west-1", "gs://b/p", "/mnt/x"):
        path = write(tmp_path, f"name: a\ncluster:\n  mirror: {right}\n")
        assert load(path).recipe.cluster.mirror == right


def test_job_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "name: a\n")
    loaded, run_id, verbose = job_arguments(
        ["--config", str(path), "--set", "seed=4", "--set", "seed=5"], "A job."
    )
    assert loaded.recipe.seed == 5
    assert not verbose and job_arguments(["--config", str(path), "--verbose"], "A job.")[2]
    assert run_id.startswith("a-20")
    assert job_arguments(["--config", str(path), "--run-id", "mine"], "A job.")[1] == "mine"
    assert job_arguments(["--config", str(path)], "A job.")[1] != run_id
    with pytest.raises(ConfigError, match="names a folder"):
        job_arguments(["--config", str(path), "--run-id", "../up"], "A job.")
    with pytest.raises(SystemExit) as stopped:
        job_arguments(["--recipe", str(path)], "A job.")
    assert stopped.value.code == 2
    assert "--config" in capsys.readouterr().err


def test_job_path_names_the_missing_file() -> None:
    assert job_path("recipes/shapes_tiny.yaml").is_file()
    with pytest.raises(FileNotFoundError, match=r"there is no recipes/none.yaml in jobs/"):
        job_path("recipes/none.yaml")
