"""The copy of a run in another store: S3-compatible, or any file system that pyarrow opens.

In: `cluster.mirror` and a run's folder. Out: `<cluster.mirror>/<run id>/` with what makes the run
go on elsewhere: checkpoints, log, model. A folder's manifest is the last of its files to come and
the first to go: what has none is not there. Which rank copies what, and when, is `copies.py`'s.
`.owner` says who copies: the last worker group that has begun.

Credentials are the environment's or the instance's. An S3 store that does not answer is an error
within a minute.
"""

from __future__ import annotations

import io
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

import pyarrow
import torch.distributed as dist
from pyarrow import fs

from fmray.config import ClusterConfig
from fmray.runtime import files as manifest
from fmray.runtime.files import MANIFEST, Entry, files_of, manifest_text, sha256
from fmray.runtime.run_log import event
from fmray.train.checkpoint import (
    STATE_FILE,
    STORAGE_HOURS,
    TrainState,
    find_checkpoint,
    kept_checkpoints,
    load_checkpoint,
    make_universal,
    new_storage_group,
    newest_first,
    owner,
    parse_state,
    prune_checkpoints,
    read_state,
    refuse_all,
    save_checkpoint,
)

CONNECT_SECONDS = 5
SILENT_SECONDS = 20  # without a byte; tried three times, as connecting is
CHUNK = 16 << 20
OWNER = ".owner"


class Mirror:
    """What is copied of the run in `run_dir`. Raises OSError when the store fails."""

    def __init__(self, uri: str, run_dir: Path) -> None:
        self.uri, self._run_dir = uri, run_dir
        self._store, path = _open(uri)
        self._root = f"{path}/{run_dir.name}"
        self._claim: str | None = None

    def __str__(self) -> str:
        return f"{self.uri.partition('?')[0]}/{self._run_dir.name}"

    def claim(self) -> None:
        """From now on no earlier one that has claimed the run seals or removes a folder."""
        self._claim = uuid.uuid4().hex
        self._write(OWNER, io.BytesIO(self._claim.encode()))

    def _check(self) -> None:
        """When the head node is lost, workers outlive their job for minutes."""
        if self._claim is not None and self.read(OWNER) != self._claim:
            raise PermissionError(f"another worker group of run {self._run_dir.name} has begun")

    def is_folder(self, folder: Path) -> bool:
        """Whether the copies would lie in `folder`."""
        return self._store.type_name == "local" and Path(self._root).resolve() == folder.resolve()

    def checkpoints(self) -> list[str]:
        """Names of the complete ones, newest first."""
        return [name for name, complete in self._folders() if complete]

    def read(self, name: str) -> str:
        """The text of a small file; FileNotFoundError where there is none."""
        with self._store.open_input_stream(f"{self._root}/{name}") as stream:
            return stream.read().decode()

    def manifest(self, folder: str) -> dict[str, Entry]:
        """The files of a complete folder. ValueError for a manifest that is not one."""
        return files_of(self.read(f"{folder}/{MANIFEST}"))

    def put(self, names: Iterable[str]) -> None:
        """Copy files, by their names in the run's folder."""
        for name in names:
            with (self._run_dir / name).open("rb") as file:
                self._write(name, file)

    def get(self, name: str, entry: Entry | None = None, into: Path | None = None) -> str | None:
        """Fetch a file into the run's folder, or another; what is wrong with it, or None.

        entry: what it should be; one that is there and is that is not fetched.
        """
        target = (into or self._run_dir) / name
        if entry is not None and _is(target, entry):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with (
                self._store.open_input_stream(f"{self._root}/{name}") as stream,
                partial.open("wb") as file,
            ):
                shutil.copyfileobj(stream, file, CHUNK)
                os.fsync(file.fileno())
        except FileNotFoundError:
            return f"{name} is missing in {self}"
        if entry is not None and not _is(partial, entry):
            size = partial.stat().st_size
            partial.unlink()
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']} in {self}"
            return f"{name} was altered in {self}: its SHA-256 is not the manifest's"
        os.replace(partial, target)
        return None

    def seal(self, folder: str, files: dict[str, Entry]) -> None:
        """Say that all of `folder` has been copied. OSError after another's `claim`."""
        self._check()
        self._write(f"{folder}/{MANIFEST}", io.BytesIO(manifest_text(files).encode()))

    def remove(self, folder: str) -> None:
        """Remove a folder, its manifest first. OSError after another's `claim`."""
        self._check()
        path = f"{self._root}/{folder}"
        for name in (f"{path}/{MANIFEST}", path):
            kind = self._store.get_file_info(name).type
            if kind == fs.FileType.File:
                self._store.delete_file(name)
            elif kind == fs.FileType.Directory:
                self._store.delete_dir(name)

    def prune(self, keep: Iterable[str]) -> None:
        """Remove all checkpoints but these, and what was left of uploads that were cut off."""
        for name, _ in self._folders():
            if name not in keep:
                self.remove(name)

    def _folders(self) -> list[tuple[str, bool]]:
        """(name, complete) of the checkpoints, newest first."""
        found = self._store.get_file_info(
            fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        )
        folders: dict[str, bool] = {}
        for info in found:
            if info.type == fs.FileType.File and "/checkpoint-" in info.path:
                name, _, file = info.path[len(self._root) + 1 :].partition("/")
                folders[name] = folders.get(name, False) or file == MANIFEST
        return sorted(folders.items(), reverse=True)

    def _write(self, name: str, source: BinaryIO) -> None:
        path = f"{self._root}/{name}"
        if self._store.type_name == "local":  # object stores have no folders to make
            self._store.create_dir(path.rpartition("/")[0])
        with self._store.open_output_stream(path) as stream:
            shutil.copyfileobj(source, stream, CHUNK)


def open_mirror(cluster: ClusterConfig, run_dir: Path) -> Mirror | None:
    """The mirror of a run, None where the recipe names none; it is asked for what it holds.

    Raises ValueError for one that cannot be opened.
    """
    if cluster.mirror is None:
        return None
    with user_mistakes(cluster.mirror):
        mirror = Mirror(cluster.mirror, run_dir)
        mirror.checkpoints()
    if mirror.is_folder(run_dir):
        raise ValueError(f"cluster.mirror: {cluster.mirror} is cluster.storage itself")
    return mirror


@contextmanager
def user_mistakes(uri: str) -> Iterator[None]:
    """What the store says becomes a ValueError of one line."""
    try:
        yield
    except (OSError, pyarrow.ArrowInvalid) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"cluster.mirror: {uri} cannot be used: {text}; check the address, that the bucket is"
            " there, and the credentials in the environment"
        ) from error


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """A file system, and the path in it."""
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        store, path = fs.FileSystem.from_uri(uri)
        return store, path.rstrip("/")
    options = dict(parse_qsl(parts.query))
    if not options.keys() & {"region", "endpoint_override"}:
        options["region"] = fs.resolve_s3_region(parts.netloc)
    store = fs.S3FileSystem(
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        allow_delayed_open=True,  # one request for a small file
        **options,
    )
    if store.get_file_info(parts.netloc).type == fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {parts.netloc}")
    return store, (parts.netloc + parts.path).rstrip("/")


def _is(path: Path, entry: Entry) -> bool:
    return (
        path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
    )


# A run's checkpoints as one rank sees them: in its node's folder, and in the mirror.
#
# In: the run's folder, of one node or shared, and `cluster.mirror`. Out: the checkpoint to go on
# from, fetched where it is not there; and copies of each new one, made while training goes on.
# Every rank copies its own files; rank 0 writes the manifest when all of them are there.

LOG = "log.jsonl"


class CheckpointManager:
    """Saves, finds, loads and mirrors the checkpoints of a run; one instance per rank.

    Every method but `wait` is collective: all ranks call it, in the same order. Create with `open`.
    """

    def __init__(
        self,
        run_dir: Path,
        mirror: Mirror | None,
        timeout_s: float,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        folder_ranks: list[int],
    ) -> None:
        """See `open`, which makes the arguments.

        Args:
            timeout_s: the timeout of the default process group.
            groups: one storage group for the calling thread, one for the thread that copies.
            folder_ranks: the ranks that see the same folder as this one.
        """
        self._run_dir, self._mirror = run_dir, mirror
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._group, self._copying = groups
        self._timeout = timedelta(seconds=timeout_s)
        self._thread: Thread | None = None
        self._newest: Path | None = None
        self._there: set[str] = set()  # complete checkpoints in the mirror, the same on all ranks
        self._folder_ranks = folder_ranks
        self._leads = self._rank == folder_ranks[0]  # does the work of which a folder needs one

    @classmethod
    def open(cls, cluster: ClusterConfig, run_dir: Path) -> CheckpointManager:
        """Open the checkpoints of the run in `run_dir`, and its mirror; collective.

        Creates two process groups, claims the mirror for this worker group, and finds out which
        ranks share a folder: all of them, or with a mirror those of one node.

        Raises:
            OSError: the mirror fails. The driver has opened it before, so a retry may succeed.
        """
        mirror = Mirror(cluster.mirror, run_dir) if cluster.mirror is not None else None
        if mirror is not None and dist.get_rank() == 0:
            mirror.claim()
        groups = new_storage_group(), new_storage_group()
        if mirror is None:
            folder_ranks = list(range(dist.get_world_size()))
        else:
            folder_ranks = _ranks_sharing(run_dir, groups[0])
        return cls(run_dir, mirror, cluster.timeout_s, groups, folder_ranks)

    def find(self) -> Path | None:
        """The newest checkpoint that is whole, by the contents of the files; each rank reads its
        share of them. What is missing or altered in a folder comes from the mirror.

        One line for each newer checkpoint that is passed over. Raises ValueError where there are
        some and none is whole.
        """
        passed: list[str] = []
        # rank 0 looks: other nodes may see a shared folder a moment later
        found: list[set[str] | None] = [None, None]
        if self._rank == 0:
            found = [{path.name for path in newest_first(self._run_dir)}, set()]
            if self._mirror is not None:
                found[1] = set(self._mirror.checkpoints())
                if not (self._run_dir / LOG).exists():
                    self._mirror.get(LOG)
        dist.broadcast_object_list(found, group=self._group)
        local, self._there = found
        for name in sorted(local | self._there, reverse=True):
            path = self._run_dir / name
            wrong = self._first(self._fault(path), self._group)
            if wrong is not None and name in self._there:
                self._say(f"{name}: {wrong}; fetched from {self._mirror}")
                wrong = self._fetch(path)
            if wrong is None:
                self._newest = path
                return path
            passed.append(f"{name}: {wrong}")
            self._say(f"{passed[-1]}; passed over for the one before")
        if len(self._folder_ranks) == self._ranks or self._there:
            refuse_all(self._run_dir, passed)
        return None  # each node has a part, and no copy was finished: there never was a whole one

    def make_universal(self, checkpoint: Path, stage: int) -> None:
        """Convert a checkpoint so that any number of workers can load it; see `checkpoint.py`."""
        make_universal(checkpoint, stage, self._folder_ranks, self._group)

    def load(self, engine: Any, checkpoint: Path, universal: bool) -> None:
        """Restore weights, optimizer and learning-rate schedule, on all ranks."""
        with self._storage_timeout():
            load_checkpoint(engine, checkpoint, universal)
            dist.barrier(group=self._group)

    @contextmanager
    def _storage_timeout(self) -> Iterator[None]:
        """Around files DeepSpeed's own barriers are as patient as a `new_storage_group`."""
        dist.set_timeout(timedelta(hours=STORAGE_HOURS))
        yield
        dist.set_timeout(self._timeout)

    def save(self, engine: Any, state: TrainState, recipe_text: str, keep: int) -> None:
        """Write a checkpoint; when the copy of the one before is finished, remove all but `keep`
        and begin to copy the new one."""
        with self._storage_timeout():
            checkpoint = save_checkpoint(
                engine, self._run_dir, state, recipe_text, self._folder_ranks, self._group
            )
        self.wait()
        if self._leads:
            prune_checkpoints(self._run_dir, state.step, keep, state.best_step)
        self._newest = checkpoint
        if self._mirror is not None:
            names = {*self._there, checkpoint.name}
            kept = kept_checkpoints(names, state.step, keep, state.best_step)
            self._thread = Thread(target=self._copy, args=(self._mirror, checkpoint, kept))
            self._thread.start()

    def wait(self) -> None:
        """Until nothing is being copied."""
        if self._thread is not None:
            if self._thread.is_alive():
                self._say("waits for the copy of a checkpoint")
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait, and copy `model/`. Raises OSError when the last checkpoint, or the model, cannot be
        copied."""
        self.wait()
        if self._mirror is None:
            return
        if self._newest is not None and self._newest.name not in self._there:
            self._copy(self._mirror, self._newest, {*self._there, self._newest.name})
            if self._newest.name not in self._there:
                raise OSError(f"{self._newest.name} could not be copied to {self._mirror}")
        if self._rank == 0:
            put_folder(self._mirror, self._run_dir / "model")

    def _copy(self, mirror: Mirror, checkpoint: Path, kept: set[str]) -> None:
        """In a thread: all ranks' files, then the manifest; then old copies go."""
        name, began = checkpoint.name, time.monotonic()
        files = manifest.files_of((checkpoint / manifest.MANIFEST).read_text(encoding="utf-8"))
        # one made by more ranks is copied by those that are left
        mine = [f"{name}/{k}" for k in files if (owner(k) or 0) % self._ranks == self._rank]

        def close() -> None:
            mirror.put([LOG])
            mirror.seal(name, files)
            mirror.prune(kept)

        wrong = (
            self._all(lambda: mirror.remove(name) if self._rank == 0 else None)
            or self._all(lambda: mirror.put(mine))
            or self._all(lambda: close() if self._rank == 0 else None)
        )
        if wrong is not None:
            self._say(f"{name} was not copied to {mirror}: {wrong}")
            return
        self._there = {*(self._there & kept), name}
        size = sum(entry["bytes"] for entry in files.values()) / 1e6
        seconds = time.monotonic() - began
        self._say(f"{name} is in {mirror} ({size:.1f} MB in {seconds:.1f} s)")

    def _all(self, work: Callable[[], None]) -> str | None:
        """Do `work` on every rank; what went wrong on the first of those that failed."""
        wrong = None
        try:
            work()
        except OSError as error:
            wrong = f"rank {self._rank}: {' '.join(str(error).split())}"
        return self._first(wrong, self._copying)

    def _first(self, wrong: str | None, group: dist.ProcessGroup) -> str | None:
        if self._ranks == 1:
            return wrong
        found: list[str | None] = [None] * self._ranks
        dist.all_gather_object(found, wrong, group=group)
        return next((text for text in found if text is not None), None)

    def _fault(self, path: Path) -> str | None:
        place = self._folder_ranks.index(self._rank)
        return manifest.fault(path, True, place, len(self._folder_ranks), self._needed)

    def _needed(self, files: dict[str, Entry]) -> dict[str, Entry]:
        """The files that this rank's folder must have: the shards of the ranks here, and what all
        ranks read. After a change of their number all of them, which are converted in each folder.
        """
        shards = {owner(name) for name in files} - {None}
        if shards and shards != set(range(self._ranks)):
            return files
        return {k: v for k, v in files.items() if owner(k) in {None, *self._folder_ranks}}

    def _fetch(self, path: Path) -> str | None:
        """Fetch what is not there of a complete checkpoint; what is wrong with it, or None."""
        found: list[dict[str, Entry] | str | None] = [None]
        if self._rank == 0:
            try:
                found = [self._mirror.manifest(path.name)]
            except ValueError as error:
                found = [str(error)]
        dist.broadcast_object_list(found, group=self._group)
        [files] = found
        if isinstance(files, str):
            return files
        if self._leads:
            begin_folder(path, files)
        dist.barrier(group=self._group)
        place = self._folder_ranks.index(self._rank)
        wrong = None
        for name, entry in list(self._needed(files).items())[place :: len(self._folder_ranks)]:
            wrong = wrong or self._mirror.get(f"{path.name}/{name}", entry)
        wrong = self._first(wrong, self._group)
        if wrong is None and self._leads:
            manifest.write_manifest(path, files)
        dist.barrier(group=self._group)
        return wrong

    def _say(self, text: str) -> None:
        if self._rank == 0:
            event(self._run_dir, text)


def _ranks_sharing(folder: Path, group: dist.ProcessGroup) -> list[int]:
    """The ranks that see the same folder: each writes a file and looks for those of the others."""
    rank = dist.get_rank()
    token = [f".here-{uuid.uuid4().hex}" if rank == 0 else None]
    dist.broadcast_object_list(token, group=group)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{token[0]}-{other}" for other in range(dist.get_world_size())]
    files[rank].touch()
    dist.barrier(group=group)
    ranks = [other for other, file in enumerate(files) if file.exists()]
    dist.barrier(group=group)
    files[rank].unlink()
    return ranks


def begin_folder(path: Path, files: dict[str, Entry]) -> None:
    """Make room for a checkpoint; what is there of it stays, of another it goes."""
    if path.is_dir():
        try:
            text = (path / manifest.MANIFEST).read_text(encoding="utf-8")
            same = manifest.files_of(text) == files
        except (FileNotFoundError, ValueError):
            same = False
        if same:
            return
        shutil.rmtree(path)
    path.mkdir()


def last_state(run_dir: Path, mirror: Mirror | None) -> tuple[str, TrainState] | None:
    """(where, state) of the newest checkpoint that seems whole, of the folder or of the mirror, as
    the driver sees them; None where there is none.

    Raises ValueError where there are some and none is whole, and for a mirror that fails.
    """
    if mirror is None:
        path = find_checkpoint(run_dir)
        return None if path is None else (str(path), read_state(path))
    with user_mistakes(mirror.uri):
        whole = (p for p in newest_first(run_dir) if manifest.fault(p, hashes=False) is None)
        local, copied = next(whole, None), next(iter(mirror.checkpoints()), None)
        if local is not None and (copied is None or local.name >= copied):
            return str(local), read_state(local)
        if copied is None:
            return None
        where = f"{mirror}/{copied}"
        return where, parse_state(mirror.read(f"{copied}/{STATE_FILE}"), where)


def put_files(mirror: Mirror | None, *names: str) -> None:
    """Copy files of the run, if it has a mirror. Raises ValueError when that cannot be written."""
    if mirror is not None:
        with user_mistakes(mirror.uri):
            mirror.put(names)


def put_folder(mirror: Mirror, folder: Path) -> None:
    """Copy a folder that one rank has written."""
    files = manifest.describe_files(folder, [p for p in folder.rglob("*") if p.is_file()])
    mirror.remove(folder.name)
    mirror.put(f"{folder.name}/{name}" for name in files)
    mirror.seal(folder.name, files)


def get_folder(mirror: Mirror | None, folder: Path) -> None:
    """Fetch what `put_folder` has copied, unless it is there. OSError when it is not whole."""
    if mirror is None or folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    for name, entry in mirror.manifest(folder.name).items():
        wrong = mirror.get(f"{folder.name}/{name}", entry, into=partial)
        if wrong is not None:
            raise OSError(wrong)
    os.replace(partial / folder.name, folder)
    partial.rmdir()


def find_model(cluster: ClusterConfig, run_dir: Path, script: str) -> Path:
    """The model that `script` has made in `run_dir`, fetched from the mirror where it is not there.

    Raises ValueError when the run has none yet.
    """
    model = run_dir / "model"
    if not model.is_dir():
        with suppress(FileNotFoundError):  # not in the mirror either
            get_folder(open_mirror(cluster, run_dir), model)
    if not model.is_dir():
        also = f" or cluster.mirror {cluster.mirror}" if cluster.mirror else ""
        raise ValueError(
            f"{run_dir}: no model/ to evaluate; --run-id must name a finished run of {script} in"
            f" cluster.storage {cluster.storage}{also}"
        )
    return model
