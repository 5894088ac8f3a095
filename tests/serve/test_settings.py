"""Settings, the builder, the recipe and the command: nothing is started."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from fmray.cli import main
from fmray.commands import serve as command
from fmray.config import TrackingConfig
from fmray.config.serve import ServeConfig
from fmray.runtime.registry import register
from fmray.serve.app import build, find_directory
from fmray.serve.keys import VARIABLE


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(words))


def test_words_become_settings() -> None:
    settings = ServeConfig.model_validate(
        {"model": "m", "max_rows": "4", "p95_ms": "150", "auto": "false", "floor": "0.6"}
    )
    assert (settings.max_rows, settings.p95_ms, settings.auto) == (4, 150.0, False)
    assert settings.public_name == "m"
    assert ServeConfig(model="models:/a b@production").registered_name == "a b"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"max_row": 3}, "did you mean max_rows"),
        ({"floor": "0"}, "no budget"),
        ({"floor": "nan"}, "finite decimal"),
        ({"p95_ms": "nan"}, "finite"),
        ({"min_replicas": 3, "max_replicas": 2}, "smaller than min_replicas"),
        ({"max_new_tokens": 99, "max_output_tokens": 9}, "smaller than max_new_tokens"),
        ({"model": "models:/a/3"}, "models:/NAME@production"),
        ({"model": "models:/@production"}, "models:/NAME@production"),
        ({"name": "a\nb"}, "pattern"),
    ],
)
def test_wrong_settings(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ServeConfig.model_validate({"model": "m"} | values)


def test_the_serve_config_fits_ray_s_schema_and_its_args_fit_ours() -> None:
    written = yaml.safe_load((Path(__file__).parents[2] / "cluster" / "serve.yaml").read_text())
    deployed = ServeDeploySchema.model_validate(written)
    [application] = deployed.applications
    assert application.import_path == "fmray.serve.app:build"
    settings = ServeConfig.model_validate(application.args)
    assert settings.registered_name == "fmray-shapes"
    assert deployed.http_options.host == "127.0.0.1"
    assert deployed.http_options.request_timeout_s > settings.request_timeout_s


def test_the_registry_s_production_version_is_served(directory: Path, tmp_path: Path) -> None:
    register(TrackingConfig(), tmp_path, "shapes", directory, "run")
    settings = ServeConfig(model="models:/shapes@production", storage=tmp_path)
    assert find_directory(settings) == directory.resolve()
    assert settings.public_name == "shapes"
    with pytest.raises(ValueError, match="no production version"):
        find_directory(ServeConfig(model="models:/none@production", storage=tmp_path))


def test_the_application_asks_for_keys_where_the_builder_saw_some(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def required() -> bool:
        application = build(ServeConfig(model=str(directory)))
        return application._bound_deployment.init_args[0].require_keys

    monkeypatch.delenv(VARIABLE, raising=False)
    assert not required()
    monkeypatch.setenv(VARIABLE, "sk-0123456789abcdef")
    assert required()


def test_a_replica_without_the_keys_that_are_required_does_not_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmray.serve.replica import open_answerer

    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match="finds none"):
        open_answerer(ServeConfig(model=str(directory), require_keys=True), directory)


def test_the_application_s_limits(directory: Path) -> None:
    application = build(
        ServeConfig(model=str(directory), max_replicas=3, max_rows=5, max_queued_requests=7)
    )
    config = application._bound_deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 3
    assert config.autoscaling_config.target_ongoing_requests == 5
    assert config.max_queued_requests == 7


def test_the_command_s_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = command.settings_of(options(str(tmp_path), "--set", "max_rows=3"))
    assert settings.model == str(tmp_path) and settings.max_rows == 3
    settings = command.settings_of(options("shapes", "--set", "floor=0.6"))
    assert settings.model == "models:/shapes@production" and settings.floor == "0.6"
    with pytest.raises(ValueError, match="did you mean max_rows"):
        command.settings_of(options("shapes", "--set", "max_row=3"))
    with pytest.raises(ValueError, match="KEY=VALUE"):
        command.settings_of(options("shapes", "--set", "max_rows"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com"])
def test_other_machines_need_a_key(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["serve", "shapes", "--host", host]) == 2
    assert "there are no keys" in capsys.readouterr().err


def test_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["serve", "nothing", "--local", "--storage", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no production version" in error and error.count("\n") == 1


def test_serving_needs_no_deepspeed() -> None:
    import subprocess
    import sys

    program = (
        "import sys; import fmray.serve.app, fmray.serve.replica, fmray.serve.routes; "
        "import fmray.commands.serve; assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
