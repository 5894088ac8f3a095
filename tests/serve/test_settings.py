"""Settings, the builder, the config file and the command; no server starts."""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from fmray.cli import main
from fmray.commands import serve as command
from fmray.config import ConfigError, TrackingConfig
from fmray.config.serve import ServeConfig
from fmray.runtime.registry import register
from fmray.serve.app import build, find_directory
from fmray.serve.keys import VARIABLE, load_keys


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(list(words))


def test_text_is_converted_to_settings() -> None:
    settings = ServeConfig.model_validate(
        {"model": "m", "max_rows": "4", "p95_ms": "150", "auto": "false", "floor": "0.6"}
    )
    assert (settings.max_rows, settings.p95_ms, settings.auto) == (4, 150.0, False)
    assert settings.public_name == "m"
    assert settings.caller_bodies_mib == 64
    hosts = ServeConfig.model_validate({"model": "m", "allowed_hosts": "a.example, b"})
    assert hosts.allowed_hosts == ("a.example", "b")
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
        ({"max_caller_bodies_mib": 8}, "smaller than max_body_mib"),
        ({"allowed_hosts": "http://a.example"}, "pattern"),
    ],
)
def test_wrong_settings_are_errors(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        ServeConfig.model_validate({"model": "m"} | values)


def test_config_file_is_valid_for_ray_and_for_the_application() -> None:
    written = yaml.safe_load((Path(__file__).parents[2] / "cluster" / "serve.yaml").read_text())
    deployed = ServeDeploySchema.model_validate(written)
    [application] = deployed.applications
    assert application.import_path == "fmray.serve.app:build"
    settings = ServeConfig.model_validate(application.args)
    assert settings.registered_name == "fmray-shapes"
    assert deployed.http_options.host == "127.0.0.1"
    assert deployed.http_options.request_timeout_s > settings.request_timeout_s


def test_the_production_version_of_the_registry_is_served(directory: Path, tmp_path: Path) -> None:
    register(TrackingConfig(), tmp_path, "shapes", directory, "run")
    settings = ServeConfig(model="models:/shapes@production", storage=tmp_path)
    assert find_directory(settings) == directory.resolve()
    assert settings.public_name == "shapes"
    with pytest.raises(ValueError, match="no production version"):
        find_directory(ServeConfig(model="models:/none@production", storage=tmp_path))


def test_the_application_requires_keys_if_the_builder_found_some(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def required() -> bool:
        application = build(ServeConfig(model=str(directory)))
        return application._bound_deployment.init_args[0].require_keys

    monkeypatch.delenv(VARIABLE, raising=False)
    assert not required()
    monkeypatch.setenv(VARIABLE, "sk-0123456789abcdef")
    assert required()


def test_a_replica_without_the_required_keys_does_not_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmray.serve.replica import load_chat_model

    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match="this replica has none"):
        load_chat_model(ServeConfig(model=str(directory), require_keys=True), directory)


def test_the_settings_become_limits_of_the_deployment(directory: Path) -> None:
    application = build(
        ServeConfig(model=str(directory), max_replicas=3, max_rows=5, max_queued_requests=7)
    )
    config = application._bound_deployment._deployment_config
    assert config.autoscaling_config.max_replicas == 3
    assert config.autoscaling_config.target_ongoing_requests == 5
    assert config.max_queued_requests == 7


def test_options_and_overrides_of_the_command_become_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = command.settings_of(options(str(tmp_path), "--set", "max_rows=3"))
    assert settings.model == str(tmp_path) and settings.max_rows == 3
    settings = command.settings_of(options("shapes", "--set", "floor=0.6"))
    assert settings.model == "models:/shapes@production" and settings.floor == "0.6"
    settings = command.settings_of(options("shapes", "--set", "max_rows=010", "--set", "name=on"))
    assert (settings.max_rows, settings.name) == (10, "on")  # YAML 1.2, as in recipes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_row=3"], "--set: max_row: there is no such key; did you mean max_rows?"),
        (["max_rows=0"], "--set: max_rows: should be greater than or equal to 1, not 0"),
        (["floor=2"], "--set: floor: '2' is no budget; write a number in (0, 1]"),
        (["min_replicas=3"], "max_replicas: 1 is smaller than min_replicas (3)"),
        (["max_rows"], "--set max_rows: write key=VALUE with a dotted key, such as train.lr=1e-5"),
    ],
)
def test_wrong_overrides_of_the_command_are_errors_of_one_line(
    overrides: list[str], message: str
) -> None:
    words = [word for text in overrides for word in ("--set", text)]
    with pytest.raises(ConfigError) as raised:
        command.settings_of(options("shapes", *words))
    assert str(raised.value) == message


def test_a_wrong_model_on_the_command_line_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"command line: model: 'models:/a/3': write models:/NAME"
    ):
        command.settings_of(options("models:/a/3"))


SECRET = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"- name: a\n  key: {SECRET}\n  burts: 3\n", ":3: 0: there is no such key; did you mean"),
        (f"- name: a\n  {SECRET}: 3\n", ":2: 0: there is no such key; the keys here are name,"),
        (f"- name: a\n  key: {SECRET}\n  weight: 0\n", ":3: 0.weight: should be greater than 0"),
        (f"- name: a\n  key: {SECRET}\n  max_budget: 7\n", ":3: 0.max_budget: '7' is no budget"),
        (f"- name: a\n  key: {SECRET}\n- name: b\n", ":3: 1: needs either `key` or `sha256`"),
        (f"- name: a\n  {SECRET}: 1\n  {SECRET}: 2\n", ":3: not valid YAML with unique keys"),
        (f"- name: a\n  key: !{SECRET} a\n", ":2: not valid YAML with unique keys"),
        (f"- name: a\n  key: [{SECRET}\n", ":3: not valid YAML with unique keys"),
        (f"name: {SECRET}\n", ": should be a valid list"),
    ],
)  # fmt: skip
def test_errors_of_a_keys_file_name_the_line_and_no_secret(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_keys(path)
    assert str(raised.value).startswith(f"{path}{message}"), str(raised.value)
    assert SECRET not in "".join(traceback.format_exception(raised.value))


def test_a_keys_file_is_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: on, key: {SECRET}, max_budget: 0.80, requests_per_second: 010}}\n")
    [caller] = load_keys(path).callers
    assert caller.name == "on"
    assert (caller.limits.max_budget, caller.limits.requests_per_second) == ("0.8", 10)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com"])
def test_listening_for_other_machines_requires_keys(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["serve", "shapes", "--host", host]) == 2
    assert "there are no keys" in capsys.readouterr().err


def test_a_missing_model_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["serve", "nothing", "--local", "--storage", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no production version" in error and error.count("\n") == 1


def test_serving_does_not_import_deepspeed() -> None:
    import subprocess
    import sys

    program = (
        "import sys; import fmray.serve.app, fmray.serve.replica, fmray.serve.routes; "
        "import fmray.commands.serve; assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
