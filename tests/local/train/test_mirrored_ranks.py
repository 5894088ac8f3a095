"""Two ranks and an S3 store: a rank killed while it copies, and nodes without a shared folder."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from support.ranks import train_on
from support.s3 import MIRRORED, NAMES, S3, die_while_copying, own_folder
from support.training import ADAPTIVE, load_recipe, losses, make_store

from fmray.config import LoadedRecipe
from fmray.runtime.run_log import read_status

TRAIN = MIRRORED | {"micro_batch": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data"))


def recipe(store: Path, storage: Path, mirror: str | None, stage: int) -> LoadedRecipe:
    cluster = {"storage": str(storage), "workers": 2, "data_cpus": 0, "mirror": mirror}
    zero = {"stage": stage, "parameter_persistence": 0}
    return load_recipe(store, storage, adaptive=ADAPTIVE, train=TRAIN, zero=zero, cluster=cluster)


@pytest.fixture(scope="module")
def wanted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run without a mirror."""
    storage = tmp_path_factory.mktemp("alone")
    train_on(2, recipe(store, storage, None, 3), "run")
    return losses(storage / "run")


def test_a_rank_killed_while_it_copies_costs_one_checkpoint(
    s3: S3, store: Path, tmp_path: Path, wanted: list[float]
) -> None:
    first = recipe(store, tmp_path / "first", s3.uri("killed"), 3)
    with pytest.raises(RuntimeError):
        train_on(2, first, "run", partial(die_while_copying, NAMES[1]))
    names = s3.names("killed/run")
    assert f"{NAMES[0]}/manifest.json" in names and f"{NAMES[1]}/manifest.json" not in names
    assert any("zero_pp_rank_1_" in name for name in names if name.startswith(NAMES[1]))
    shutil.rmtree(tmp_path / "first")

    # another machine with one rank resumes from step 3; the partial copy of step 6 is removed
    train_on(1, recipe(store, tmp_path / "second", s3.uri("killed"), 3), "run")
    assert losses(tmp_path / "second" / "run") == pytest.approx(wanted, rel=1e-4)
    status = read_status(tmp_path / "second" / "run")
    assert (status.start, status.total, len(status.workers)) == (3, 8, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="private mounts need root")
@pytest.mark.parametrize("stage", [2, 3])
def test_nodes_without_a_shared_folder(
    s3: S3, store: Path, tmp_path: Path, wanted: list[float], stage: int
) -> None:
    """Each rank has its own folder at the same path; it fetches lost files from the mirror, and
    only those that its rank reads."""
    storage, prefix = tmp_path / "runs", f"apart-{stage}"
    loaded = recipe(store, storage, s3.uri(prefix), stage)
    before = partial(own_folder, storage)
    train_on(2, loaded, "run", before)
    assert losses(tmp_path / "runs-0" / "run") == pytest.approx(wanted, rel=1e-4)
    shard = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    files = [path.relative_to(tmp_path) for path in tmp_path.glob(f"runs-1/run/{NAMES[2]}/**/*")]
    assert files and not [path for path in files if shard in path.name]

    # as if the last checkpoint was never made, and rank 1 runs on a new machine
    for name in s3.names(f"{prefix}/run"):
        if name.startswith((NAMES[2], "model")):
            s3.store.delete_file(f"checkpoints/{prefix}/run/{name}")
    for rank in (0, 1):
        shutil.rmtree(tmp_path / f"runs-{rank}" / "run" / NAMES[2])
    kept = tmp_path / "runs-0" / "run" / NAMES[1] / "deepspeed"
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    shutil.rmtree(tmp_path / "runs-1")
    train_on(2, loaded, "run", before)
    assert losses(tmp_path / "runs-0" / "run") == pytest.approx(wanted, rel=1e-4)
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == times
    names = {path.name for path in tmp_path.glob(f"runs-1/run/{NAMES[1]}/**/*")}
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in names
    assert shard not in names and not any(name.endswith(".partial") for name in names)
