"""README and docs/: every file, script, option, subcommand and recipe key named there exists."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support.tiny_models import batch, tiny_llava

from fmray.cli import COMMANDS, main
from fmray.commands import jobs
from fmray.config import load
from fmray.config.serve import ServeConfig

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
KINDS = [kind.recipe for kind in jobs.KINDS.values()]
RECIPES = ROOT / "jobs" / "recipes"
ACTIONS = {jobs.script_of(action): action for action in jobs.ACTIONS}  # by script
EXAMPLES = {"jobs/recipes/mine.yaml"}  # recipes that the reader writes
JOB_OPTIONS = {"--config", "--set", "--run-id", "--verbose"}

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fences(text: str, *languages: str) -> list[str]:
    """Return the bodies of fenced blocks of these languages, indented ones too."""
    blocks = re.findall(r"(?ms)^ *```(\w*)\n(.*?)^ *```$", text)
    return [body for language, body in blocks if language in languages]


def commands(text: str) -> list[str]:
    """Return each command line of the shell blocks and each inline code span."""
    shell = "\n".join(fences(text, "bash")).replace("\\\n", " ")
    shell = re.sub(r"(?m)(?:^|\s)#.*$", "", shell)
    prose = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    return [*shell.splitlines(), *re.findall(r"`([^`\n]+)`", prose)]


def python_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (script, words after it) of every `python jobs/...` and `python benchmarks/...`."""
    for line in commands(text):
        for script, rest in re.findall(r"python ((?:jobs|benchmarks)/\w+\.py)([^'\"&|]*)", line):
            yield script, shlex.split(rest)


def values_of(option: str, words: list[str]) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == option]


def recipe_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every field, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in _models(field.annotation):
            yield from recipe_keys(section, f"{prefix}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in getattr(annotation, "__args__", ()):
        yield from _models(part)


KEYS = {key for kind in KINDS for key in recipe_keys(kind)}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/generate_recipes.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slug(title: str) -> str:
    """Return the anchor of a heading, as mkdocs and GitHub make it."""
    words = re.sub(r"[^\w\s-]", "", title.lower()).strip()
    return re.sub(r"[\s-]+", "-", words)


def test_the_readme_fits_a_few_screens() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 230
    [commands] = [body for body in fences(text, "bash") if "quickstart" in body]
    assert "pip install -e . && fmray quickstart" in commands
    assert 'pip install -e ".[test]" && pytest -n 2' in commands


@by_name
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text()))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        if page.parent == ROOT / "docs":
            assert page.parent in target.parents, f"{link} is outside of the site"
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", target.read_text())
            assert anchor in {slug(title) for title in titles}, link


@by_name
def test_paths_exist(page: Path) -> None:
    folders = "benchmarks|cluster|docs|fmray|jobs|tests|tune_spaces"
    text = re.sub(r"https?://\S+", "", page.read_text())
    named = set(re.findall(rf"(?<![\w/.$-])(?:{folders})/[\w./-]*\w", text))
    named -= EXAMPLES
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@by_name
def test_jobs_and_benchmarks_take_their_command_lines(page: Path) -> None:
    for script, words in python_commands(page.read_text()):
        for key in values_of("--set", words):
            assert key.partition("=")[0] in KEYS, (script, key)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if script.startswith("benchmarks/"):
            source = (ROOT / script).read_text()
            assert all(f'"{option}"' in source for option in options - {"--help"}), script
            continue
        assert options <= JOB_OPTIONS, (script, options)
        action = ACTIONS[Path(script).stem]
        kinds = [kind.recipe for kind in jobs.KINDS.values() if getattr(kind, action)]
        for recipe in values_of("--config", words):
            if recipe.startswith("jobs/") and recipe not in EXAMPLES:
                load(ROOT / recipe, values_of("--set", words), kinds)


@by_name
def test_fmray_takes_its_command_lines(page: Path) -> None:
    for line in commands(page.read_text()):
        if not (found := re.search(r"(?:^|&& |-- )fmray ([a-z].*)", line)):
            continue
        name, *words = shlex.split(found[1].partition(" && ")[0])
        assert name in COMMANDS, line
        if not words:
            continue
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        # raises SystemExit for an option that the subcommand does not have
        parser.parse_args(words)


@by_name
def test_keys_in_prose_exist(page: Path) -> None:
    prose = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text())
    named = re.findall(r"`([a-z_]+\.[a-z_.]+)(?:[=: ][^`]*)?`", prose)
    keys = {name for name in named if name.partition(".")[0] in SECTIONS}
    assert {key for key in keys if not key.endswith((".py", ".yaml"))} <= KEYS


@by_name
def test_recipes_in_the_text_load(page: Path, tmp_path: Path) -> None:
    for path in RECIPES.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    for i, body in enumerate(fences(page.read_text(), "yaml")):
        body = re.sub(r"(?m)^    ", "", body) if body.startswith("    ") else body
        if isinstance(yaml.safe_load(body), dict):
            (tmp_path / f"example{i}.yaml").write_text(body)
            load(tmp_path / f"example{i}.yaml", (), KINDS)


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_mistakes_are_reported_as_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "name: mine\ncluster:\n  workers: 2\n\ntrain:\n  micro_batch: 16\n"
    session = re.findall(r"(?m)^\$ fmray (.*)\n(fmray: .*)$", (ROOT / name).read_text())
    assert session
    for command, message in session:
        typo = "  micro_bach: 8\n" if "micro_bach" in message else ""
        (tmp_path / "my.yaml").write_text(recipe + typo)
        assert main(shlex.split(command)) == 2
        assert capsys.readouterr().err == message + "\n"


def test_the_python_api_runs_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = fences((ROOT / "docs" / "models.md").read_text(), "python")
    monkeypatch.chdir(tmp_path)
    names = {"base": tiny_llava(), **batch([12, 9], "left", answers=[3, 3])}
    exec(block, names)
    assert names["model"].layout == names["layout"]
    assert names["output"].loss > 0
    assert len(names["ids"]) == 2
    assert names["units_on"] > 0


def test_endpoint_settings_in_the_text_exist() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    for name in ("release", "floor", "p95_ms", "request_timeout_s"):
        assert f"`{name}`" in text
        assert name in ServeConfig.model_fields


def test_the_reference_has_every_key(generator: ModuleType) -> None:
    text = generator.reference()
    for kind in KINDS:
        assert f"`kind: {kind.model_fields['kind'].default}`" in text
    documented = set(re.findall(r"(?m)^(?:\| |#### )`([\w.\[\]]+)`", text))
    documented = {name.replace("[]", "").replace(".NAME", "") for name in documented}
    assert documented >= KEYS
    assert set(ServeConfig.model_fields) <= documented
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_the_reference_replaces_its_marker(generator: ModuleType) -> None:
    class File:
        src_uri = "recipes.md"

    class Page:
        file = File

    text = (ROOT / "docs" / "recipes.md").read_text()
    page = generator.on_page_markdown(text, Page)
    assert generator.MARKER not in page
    assert "| `train.lr` | number > 0 | `1e-05` |" in page
    with pytest.raises(ValueError, match="has no line"):
        generator.on_page_markdown("", Page)


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [name for entry in site["nav"] for name in entry.values()]
    assert sorted(listed) == [path.name for path in DOCS]
