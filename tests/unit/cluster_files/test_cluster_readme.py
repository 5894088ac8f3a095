"""docs/cluster.md: every path is there, and every command is one that its program takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from mlflow.cli import cli as mlflow_cli
from ray.dashboard.modules.job.cli import job_cli_group
from ray.scripts import scripts as ray_scripts
from support.cluster_files import CLUSTER, ROOT, one

from fmray.cli import COMMANDS, main
from fmray.config import AdaLlavaRecipe
from fmray.config.arguments import job_arguments

TEXT = (ROOT / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)
SHELL = [
    re.sub(r"(?m)(?:^|\s)#.*$", "", body.replace("\\\n", " "))  # without comments
    for language, body in BLOCKS
    if language == "bash"
]
MINE = "jobs/recipes/mine.yaml"  # the page's own example


def commands(program: str) -> list[list[str]]:
    """The words after `program` in every command of the page, also of one that another runs."""
    others = re.compile(r"(?:^|\$\()(?:aws|docker|helm|kubectl|pip) ")  # to them fmray is a name
    lines = [line for line in "\n".join(SHELL).splitlines() if not others.search(line)]
    pattern = re.compile(rf"(?:^|(?<=[ '\"])){program} ([^'\"#&|]*)")
    return [shlex.split(found) for line in lines for found in pattern.findall(line)]


def test_every_path_is_there() -> None:
    named = set(re.findall(r"\b(?:cluster|jobs|tests|fmray)/[\w./-]*\w", TEXT))
    named -= {MINE}
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
    inside = {str(path.relative_to(ROOT)) for path in CLUSTER.rglob("*.yaml")}
    assert inside <= named, "a file that the page does not speak of"
    assert 'grep -rn "EDIT" cluster' in TEXT
    for mark in ("EDIT", "SIZE"):
        for path in (*(CLUSTER / "ray_up").iterdir(), CLUSTER / "kuberay" / "rayjob.yaml"):
            assert mark in path.read_text(), (mark, path.name)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the checkout, with the page's own recipe in it."""
    (tmp_path / "jobs" / "recipes").mkdir(parents=True)
    for path in (ROOT / "jobs" / "recipes").iterdir():
        (tmp_path / "jobs" / "recipes" / path.name).write_text(path.read_text())
    [recipe] = [body for language, body in BLOCKS if language == "yaml"]
    (tmp_path / MINE).write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_jobs_take_their_command_lines(checkout: Path) -> None:
    found = [words for words in commands("python") if words[0].startswith("jobs/")]
    assert len(found) == 8
    sizes = set()
    for script, *words in found:
        assert (ROOT / script).is_file()
        loaded, run_id = job_arguments(words, script)
        assert isinstance(loaded.recipe, AdaLlavaRecipe)
        if script.startswith("jobs/train"):
            assert run_id == words[words.index("--run-id") + 1]
        sizes.add((loaded.recipe.cluster.workers, loaded.recipe.train.micro_batch))
    assert {(8, 4), (64, 2), (8, 2)} <= sizes


def test_the_table_of_sizes_is_what_the_files_say(checkout: Path) -> None:
    small = dict(re.findall(r"\| `((?:cluster|train)\.\w+)`[^|]*\| (\d+) \| \d+ \|", TEXT))
    large = dict(re.findall(r"\| `((?:cluster|train)\.\w+)`[^|]*\| \d+ \| (\d+) \|", TEXT))
    assert set(small) == {"cluster.workers", "train.micro_batch"}
    for size in (small, large):
        words = [f"{key}={value}" for key, value in size.items()]
        arguments = ["--config", MINE, *(w for word in words for w in ("--set", word))]
        recipe = job_arguments(arguments, "")[0].recipe
        assert isinstance(recipe, AdaLlavaRecipe)
        nodes = {8: 1, 64: 8}[recipe.cluster.workers]
        assert recipe.cluster.workers == nodes * 8
    written = yaml.safe_load(one("ConfigMap")["data"]["recipe.yaml"])
    assert str(written["cluster"]["workers"]) == small["cluster.workers"]
    assert str(written["train"]["micro_batch"]) == small["train.micro_batch"]


def test_a_size_that_does_not_divide_is_caught(checkout: Path) -> None:
    with pytest.raises(ValueError, match="128 is not a multiple"):
        job_arguments(["--config", MINE, "--set", "cluster.workers=64"], "")


def test_fmray_takes_its_command_lines(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inline = re.findall(r"`fmray (\w+)([^`]*)`", TEXT)
    assert {name for name, _ in inline} <= set(COMMANDS)
    for words in [*commands("fmray"), *([name, *rest.split()] for name, rest in inline)]:
        with pytest.raises(SystemExit) as left:
            main([*words, "--help"])
        assert left.value.code == 0
    capsys.readouterr()


def ray_commands() -> Iterator[list[str]]:
    for line in "\n".join(SHELL).splitlines():
        if line.startswith("ray "):
            words = shlex.split(line.replace("$CLUSTER", "cluster/ray_up/aws.yaml"), comments=True)
            yield [word for word in words[1:] if word not in ("&", ">", "/dev/null")]


def check_ray(words: list[str]) -> None:
    """Raises click's UsageError for a command or option that Ray does not have."""
    group: click.Command = ray_scripts.cli
    if words[0] == "job":
        group, words = job_cli_group, words[1:]
    assert isinstance(group, click.Group)
    name, command, rest = group.resolve_command(click.Context(group), words)
    assert command is not None
    command.make_context(name, rest)


def test_ray_takes_its_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = list(ray_commands())
    assert len(found) > 12
    for words in found:
        check_ray(words)
    with pytest.raises(click.UsageError):
        check_ray(["up", "--no-such-option", "cluster/ray_up/aws.yaml"])


def test_mlflow_takes_its_command_lines() -> None:
    """Those of the page and of the heads of `ray up`, by the server's own parser."""
    server = mlflow_cli.commands["server"]
    lines = [" ".join(words) for words in commands("mlflow server")]
    for path in (CLUSTER / "ray_up").iterdir():
        written = yaml.safe_load(path.read_text())["head_start_ray_commands"]
        [line] = [c.partition("mlflow server ")[2] for c in written if "mlflow server" in c]
        lines.append(re.sub(r"\$\(python.*?'\)", "10.0.0.1", line).partition(" >")[0])
    assert len(lines) == 4
    for line in lines:
        values = server.make_context("server", line.split()).params
        assert values["backend_store_uri"] == "sqlite:////shared/mlflow/mlflow.db"
        assert values["artifacts_destination"] == "/shared/mlflow/artifacts"
        assert values["host"] in ("127.0.0.1", "10.0.0.1")


def test_services_are_those_that_the_operator_makes() -> None:
    named = set(re.findall(r"svc/([\w-]+)", TEXT))
    assert named == {
        f"{one('RayCluster')['metadata']['name']}-head-svc",
        f"{one('RayService')['metadata']['name']}-serve-svc",
        "mlflow",
    }
    assert set(re.findall(r"get rayjob ([\w-]+)", TEXT)) == {one("RayJob")["metadata"]["name"]}
    assert f"get rayservice {one('RayService')['metadata']['name']}" in TEXT
    assert "release:" in one("RayService")["spec"]["serveConfigV2"]
