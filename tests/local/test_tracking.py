"""MLflow tracking on real stores: sqlite files, a real server, and stores that fail."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fmray.config import TrackingConfig
from fmray.runtime import tracking
from fmray.runtime.registry import TrackingError, production, register
from fmray.runtime.tracking import open_run, tracking_uri

SQLITE = TrackingConfig()


@pytest.fixture(scope="module", autouse=True)
def _no_telemetry() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    patch.undo()


def client_of(config: TrackingConfig, storage: Path):
    from mlflow import MlflowClient

    uri = tracking_uri(config, storage)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def all_runs(storage: Path, config: TrackingConfig = SQLITE) -> list:
    client = client_of(config, storage)
    experiment = client.get_experiment_by_name(config.experiment)
    return client.search_runs([experiment.experiment_id])


def history(storage: Path, mlflow_run_id: str, name: str, config: TrackingConfig = SQLITE) -> list:
    return client_of(config, storage).get_metric_history(mlflow_run_id, name)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def model_directory(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights of " + folder.name.encode())
    (folder / "config.json").write_text("{}")
    return folder


# --- A run ---


def test_a_run_is_recorded_completely(tmp_path):
    report = tmp_path / "report.txt"
    report.write_text("fine")
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "curve.png").write_bytes(b"png")
    parameters = {"train": {"lr": 1e-5, "zero": {"stage": 2}}, "name": "x", "long": "y" * 9000}
    with open_run(SQLITE, tmp_path, "job-1", parameters | {"empty": ""}, {"who": "me"}) as run:
        for step in range(2500):  # three batches
            run.log(step, **{"train/loss": step / 2, "accuracy@0.5": 1.0})
        run.artifact(report)
        run.artifact(folder, "plots")
    (recorded,) = all_runs(tmp_path)
    assert recorded.info.run_id == run.mlflow_run_id
    assert (recorded.info.status, recorded.info.run_name) == ("FINISHED", "job-1")
    assert recorded.data.params["train.lr"] == "1e-05"
    assert recorded.data.params["train.zero.stage"] == "2"
    assert len(recorded.data.params["long"]) == 6000
    assert recorded.data.tags["fmray.run_id"] == "job-1"
    assert recorded.data.tags["who"] == "me"
    losses = history(tmp_path, run.mlflow_run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(step, step / 2) for step in range(2500)]
    assert [m.timestamp for m in losses] == sorted(m.timestamp for m in losses)
    assert len(history(tmp_path, run.mlflow_run_id, "accuracy_0.5")) == 2500
    files = tmp_path / "mlartifacts" / run.mlflow_run_id / "artifacts"
    assert (files / "report.txt").read_text() == "fine"
    assert (files / "plots" / "figures" / "curve.png").read_bytes() == b"png"


def test_a_restart_continues_the_same_run(tmp_path, caplog):
    with open_run(SQLITE, tmp_path, "job", {"lr": 1, "epochs": 2}) as first:
        first.log(0, loss=3.0)
    with open_run(SQLITE, tmp_path, "job", {"lr": 1, "epochs": 3, "new": 4}) as second:
        second.log(1, loss=2.0)
        until(lambda: all_runs(tmp_path)[0].info.status == "RUNNING")
    assert first.mlflow_run_id == second.mlflow_run_id
    (recorded,) = all_runs(tmp_path)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params == {"lr": "1", "epochs": "2", "new": "4"}
    assert [m.step for m in history(tmp_path, first.mlflow_run_id, "loss")] == [0, 1]
    (warning,) = warnings_of(caplog)
    assert "epochs (2 -> 3)" in warning
    with open_run(SQLITE, tmp_path, "other", {}) as other:
        pass
    assert other.mlflow_run_id != first.mlflow_run_id


def test_a_killed_process_loses_at_most_a_flush_and_its_run_is_reopened(tmp_path):
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from fmray.config import TrackingConfig
        from fmray.runtime.tracking import open_run
        run = open_run(TrackingConfig(), Path(sys.argv[1]), "job", {"lr": 1})
        for step in range(10):
            run.log(step, loss=float(step))
        print(run.mlflow_run_id, flush=True)
        deadline = time.monotonic() + 30
        while run._metrics and time.monotonic() < deadline:  # the thread writes them
            time.sleep(0.05)
        print("written", flush=True)
        time.sleep(600)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        mlflow_run_id = process.stdout.readline().strip()
        assert process.stdout.readline().strip() == "written"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    (killed,) = all_runs(tmp_path)
    assert (killed.info.run_id, killed.info.status) == (mlflow_run_id, "RUNNING")
    assert [m.step for m in history(tmp_path, mlflow_run_id, "loss")] == list(range(10))
    with open_run(SQLITE, tmp_path, "job", {"lr": 1}) as run:
        run.log(10, loss=10.0)
    assert run.mlflow_run_id == mlflow_run_id
    (ended,) = all_runs(tmp_path)
    assert ended.info.status == "FINISHED"
    assert [m.step for m in history(tmp_path, mlflow_run_id, "loss")] == list(range(11))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("boom"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_the_status_is_how_the_block_ended(error, status, tmp_path):
    def train() -> None:
        with open_run(SQLITE, tmp_path, "job", {}) as run:
            run.log(1, loss=1.0)
            raise error

    with pytest.raises(type(error)):
        train()
    (recorded,) = all_runs(tmp_path)
    assert recorded.info.status == status
    assert recorded.data.metrics == {"loss": 1.0}


def test_finish_twice_and_log_afterwards_do_nothing(tmp_path):
    run = open_run(SQLITE, tmp_path, "job", {})
    run.finish("FAILED")
    run.finish("FINISHED")
    run.log(1, loss=1.0)
    run.artifact(tmp_path)
    (recorded,) = all_runs(tmp_path)
    assert recorded.info.status == "FAILED"
    assert recorded.data.metrics == {}


def test_a_trial_is_a_child_of_its_search(tmp_path):
    with open_run(SQLITE, tmp_path, "search", {}) as search:
        parent = search.mlflow_run_id
        with open_run(SQLITE, tmp_path, "search-1", {"lr": 1}, parent=parent) as trial:
            trial.log(1, loss=1.0)
    recorded = client_of(SQLITE, tmp_path).get_run(trial.mlflow_run_id)
    assert recorded.data.tags["mlflow.parentRunId"] == parent
    assert recorded.info.status == "FINISHED"


def test_readers_do_not_disturb_the_writer(tmp_path, caplog):
    with open_run(SQLITE, tmp_path, "job", {}) as run:
        assert run.mlflow_run_id
        stop = threading.Event()
        lengths = [0]

        def read() -> None:
            while not stop.is_set():
                lengths.append(len(history(tmp_path, run.mlflow_run_id, "loss")))

        reader = threading.Thread(target=read)
        reader.start()
        for step in range(3000):
            run.log(step, loss=1.0)
        try:
            until(lambda: lengths[-1] == 3000)
        finally:
            stop.set()
            reader.join()
    assert lengths == sorted(lengths)
    assert len(history(tmp_path, run.mlflow_run_id, "loss")) == 3000
    assert warnings_of(caplog) == []


# --- Stores that fail ---


def test_a_dead_server_is_one_warning_and_costs_no_time(tmp_path, caplog):
    config = TrackingConfig(uri=f"http://user:secret@127.0.0.1:{closed_port()}")
    before = dict(os.environ)
    import mlflow  # noqa: F401  the import is not timed

    start = time.monotonic()
    with open_run(config, tmp_path, "job", {"lr": 1}) as run:
        for step in range(100):
            run.log(step, loss=1.0)
        assert time.monotonic() - start < 1.0
        assert run.mlflow_run_id is None
        assert len(warnings_of(caplog)) == 1
        until(lambda: run._failures >= 2)
        assert len(warnings_of(caplog)) == 1
    assert time.monotonic() - start < 10
    first, last = warnings_of(caplog)
    assert "training continues" in first
    assert "100 metrics and 0 files not recorded, run not ended" in last
    assert "secret" not in caplog.text
    assert {name: value for name, value in os.environ.items() if name in before} == before
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_the_users_mlflow_settings_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    with open_run(SQLITE, tmp_path, "job", {}):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_finish_gives_up_on_a_server_that_does_not_answer(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        run = open_run(config, tmp_path, "job", {})
        run.log(1, loss=1.0)
        start = time.monotonic()
        run.finish()
        assert time.monotonic() - start < 4
    (warning,) = warnings_of(caplog)
    assert "1 metrics" in warning
    assert "no answer in 1 s" in warning
    run._thread.join(20)  # the abandoned thread makes no further attempt
    assert not run._thread.is_alive()
    assert len(warnings_of(caplog)) == 1


def test_a_database_locked_for_a_while_loses_nothing(tmp_path, caplog, monkeypatch):
    send, sending = tracking.Run._send, threading.Event()

    def signal_and_send(run, *arguments) -> None:
        sending.set()
        send(run, *arguments)

    monkeypatch.setattr(tracking.Run, "_send", signal_and_send)
    with open_run(SQLITE, tmp_path, "job", {}) as run:
        assert run.mlflow_run_id
        lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        for step in range(50):
            run.log(step, loss=1.0)
        assert time.monotonic() - start < 0.5
        assert sending.wait(30)
        time.sleep(0.3)  # the write waits for the lock
        lock.execute("COMMIT")
        lock.close()
    assert len(history(tmp_path, run.mlflow_run_id, "loss")) == 50
    assert warnings_of(caplog) == []


def test_a_broken_database_is_one_warning(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be read as one")
    with open_run(SQLITE, tmp_path, "job", {}) as run:
        run.log(1, loss=1.0)
    first, last = warnings_of(caplog)
    assert "not a database" in first
    assert "1 metrics" in last


def test_a_storage_folder_that_cannot_be_created_is_two_warnings(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with open_run(SQLITE, tmp_path / "file" / "storage", "job", {}) as run:
        run.log(1, loss=1.0)
    assert len(warnings_of(caplog)) == 2


def test_a_deleted_run_and_a_lost_file_are_counted(tmp_path, caplog):
    with open_run(SQLITE, tmp_path, "job", {}) as run:
        run.artifact(tmp_path / "nosuch.txt")
        client_of(SQLITE, tmp_path).delete_run(run.mlflow_run_id)
        for step in range(5):
            run.log(step, loss=1.0)
    assert "5 metrics and 1 files not recorded" in warnings_of(caplog)[-1]
    with open_run(SQLITE, tmp_path, "job", {}) as again:
        pass
    assert again.mlflow_run_id != run.mlflow_run_id


def test_the_queue_is_bounded(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "_QUEUE_LENGTH", 10)
    config = TrackingConfig(uri=f"http://127.0.0.1:{closed_port()}")
    with open_run(config, tmp_path, "job", {}) as run:
        assert run.mlflow_run_id is None
        for step in range(100):
            run.log(step, loss=1.0)
        assert len(run._metrics) == 10
    assert "100 metrics" in warnings_of(caplog)[-1]


# --- Output ---


def test_nothing_is_printed(tmp_path):
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from fmray.config import TrackingConfig
        from fmray.runtime.tracking import open_run, register
        with open_run(TrackingConfig(), Path(sys.argv[1]), "job", {}) as run:
            run.log(1, loss=1.0)
        (Path(sys.argv[1]) / "a.safetensors").write_bytes(b"x")
        register(TrackingConfig(), Path(sys.argv[1]), "m", Path(sys.argv[1]), "job")
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


# --- The registry ---


def test_the_production_alias_moves(tmp_path):
    one, two = model_directory(tmp_path / "one"), model_directory(tmp_path / "two")
    with open_run(SQLITE, tmp_path, "job", {}) as run:
        pass
    assert register(SQLITE, tmp_path, "shapes", one, "job") == "1"
    assert production(SQLITE, tmp_path, "shapes") == one
    assert register(SQLITE, tmp_path, "shapes", two, "job-without-run") == "2"
    assert production(SQLITE, tmp_path, "shapes") == two
    client = client_of(SQLITE, tmp_path)
    assert client.get_model_version("shapes", "1").run_id == run.mlflow_run_id
    assert client.get_model_version("shapes", "2").tags == {"fmray.run_id": "job-without-run"}


def test_the_registry_rejects_unusable_names_and_models(tmp_path):
    model = model_directory(tmp_path / "model with space")
    with pytest.raises(ValueError, match="no production version of model 'shapes'"):
        production(SQLITE, tmp_path, "shapes")
    with pytest.raises(ValueError, match="no safetensors file"):
        register(SQLITE, tmp_path, "shapes", tmp_path / "nosuch", "job")
    for name in ("a/b", "..", "", "a:b"):
        with pytest.raises(ValueError, match="model name"):
            register(SQLITE, tmp_path, name, model, "job")
    with pytest.raises(ValueError, match=r"tracking\.enabled is false"):
        register(TrackingConfig(enabled=False), tmp_path, "shapes", model, "job")
    register(SQLITE, tmp_path, "shapes", model, "job")
    assert production(SQLITE, tmp_path, "shapes") == model
    client_of(SQLITE, tmp_path).create_registered_model("bare")
    with pytest.raises(ValueError, match="no production version of model 'bare'"):
        production(SQLITE, tmp_path, "bare")
    (model / "model.safetensors").unlink()
    (model / "config.json").unlink()
    model.rmdir()
    with pytest.raises(
        ValueError, match=r"is missing; .*`fmray models register job shapes --storage "
    ):
        production(SQLITE, tmp_path, "shapes")


def test_a_dead_registry_is_an_error_at_once(tmp_path):
    config = TrackingConfig(uri=f"http://user:secret@127.0.0.1:{closed_port()}")
    start = time.monotonic()
    with pytest.raises(TrackingError, match=r"looking up 'shapes' in http://127\.0") as caught:
        production(config, tmp_path, "shapes")
    assert "secret" not in str(caught.value)
    with pytest.raises(TrackingError, match="registering 'shapes'"):
        register(config, tmp_path, "shapes", model_directory(tmp_path / "model"), "job")
    assert time.monotonic() - start < 5


# --- A real server ---


class Server:
    """`mlflow server` on 127.0.0.1; `stop` ends its process group."""

    def __init__(self, folder: Path, port: int) -> None:
        self.config = TrackingConfig(uri=f"http://127.0.0.1:{port}")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        with open(folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.config.uri}/health", timeout=1):
                    return True
            except OSError:
                time.sleep(0.2)
        return False

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    running = Server(folder, closed_port())
    try:
        if not running.wait(120):
            log = (folder / "server.log").read_text()
            assert running.process.poll() is None, f"mlflow server died: {log[-2000:]}"
            pytest.skip("mlflow server did not start within 120 s: the machine is too busy")
        yield running
    finally:
        running.stop()


def test_a_real_server_end_to_end_and_when_it_stops(server, tmp_path, caplog):
    config, storage = server.config, tmp_path / "storage"
    report = tmp_path / "report.txt"
    report.write_text("fine")
    with open_run(config, storage, "job", {"lr": 1, "empty": ""}, {"who": "me"}) as run:
        for step in range(1500):
            run.log(step, loss=float(step), **{"eval/accuracy@0.5": float("nan")})
        run.artifact(report)
    (recorded,) = all_runs(storage, config)
    assert (recorded.info.run_id, recorded.info.status) == (run.mlflow_run_id, "FINISHED")
    assert recorded.data.params == {"lr": "1", "empty": ""}
    losses = history(storage, run.mlflow_run_id, "loss", config)
    assert [m.value for m in losses] == [float(step) for step in range(1500)]
    files = client_of(config, storage).list_artifacts(run.mlflow_run_id)
    assert [file.path for file in files] == ["report.txt"]

    with pytest.raises(ValueError, match="no run 'nosuch' in experiment 'fmray'"):
        register(config, storage, "shapes", model_directory(tmp_path / "model"), "nosuch")
    for version in ("1", "2"):
        directory = model_directory(tmp_path / f"model-{version}")
        assert register(config, storage, "shapes", directory, "job") == version
        fetched = production(config, storage, "shapes")
        assert fetched.is_relative_to(storage)
        weights = (fetched / "model.safetensors").read_bytes()
        assert weights == f"weights of model-{version}".encode()
    assert production(config, storage, "shapes") == fetched
    assert warnings_of(caplog) == []

    with open_run(config, storage, "job", {"lr": 1, "empty": ""}) as again:
        assert again.mlflow_run_id == run.mlflow_run_id
        server.stop()
        start = time.monotonic()
        again.log(1500, loss=0.0)
    assert time.monotonic() - start < 10
    first, last = warnings_of(caplog)
    assert "training continues" in first
    assert "1 metrics and 0 files not recorded, run not ended" in last


def test_flush_writes_everything_logged_before_it(tmp_path):
    """A process killed right after a checkpoint has lost nothing before it."""
    with open_run(SQLITE, tmp_path, "flushed", {}) as run:
        client = client_of(SQLITE, tmp_path)
        assert run.mlflow_run_id is not None
        for step in range(1, 6):
            run.log(step, loss=1.0 / step)
            run.flush(seconds=30.0)
            history = client.get_metric_history(run.mlflow_run_id, "loss")
            assert [metric.step for metric in history] == list(range(1, step + 1))
    run.flush()  # does nothing on a finished run


def test_a_deleted_experiment_is_a_warning_with_its_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_run(SQLITE, tmp_path, "first", {}).finish()
    client = client_of(SQLITE, tmp_path)
    experiment = client.get_experiment_by_name(SQLITE.experiment).experiment_id
    client.delete_experiment(experiment)
    open_run(SQLITE, tmp_path, "second", {}).finish()
    first, *_ = warnings_of(caplog)
    assert f"the experiment {SQLITE.experiment!r} was deleted: set tracking.experiment" in first
    assert first.endswith(f"mlflow experiments restore --experiment-id {experiment}`")
    client.restore_experiment(experiment)
    open_run(SQLITE, tmp_path, "third", {}).finish()
    assert len(all_runs(tmp_path)) == 2
