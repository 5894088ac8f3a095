"""A run's checkpoints on several nodes, and their mirror in a second store.

`Mirror` is the copy of a run in `<cluster.mirror>/<run id>/`: an S3-compatible store, or any file
system that pyarrow opens. It contains what a resume on other machines needs: checkpoints, log and
model. The manifest of a folder is uploaded last and deleted first, so a folder without one is
incomplete. `.owner` names the worker group that started last; earlier ones may not change it.

`CheckpointManager` is what each rank of a training job uses: it finds the checkpoint to resume,
fetches missing files from the mirror, and mirrors each new checkpoint while training continues.
Every rank copies its own files; rank 0 writes the manifest once all of them are there.

Credentials come from the environment or the instance. An S3 store that does not answer is an error
within a minute.
"""

from __future__ import annotations

import io
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
from fmray.runtime import files
from fmray.runtime.files import MANIFEST, Entry
from fmray.runtime.run_log import event
from fmray.train.checkpoint import (
    STATE_FILE,
    STORAGE_HOURS,
    TrainState,
    checkpoints_to_keep,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    make_universal,
    new_storage_group,
    parse_state,
    prune_checkpoints,
    quick_fault,
    raise_if_all_damaged,
    read_state,
    save_checkpoint,
    shard_rank,
)

CONNECT_SECONDS = 5
SILENT_SECONDS = 20  # without a byte; like connecting, retried twice
CHUNK = 16 << 20
OWNER = ".owner"
LOG = "log.jsonl"


# --- The mirror of a run ---


class Mirror:
    """The copy of the run in `run_dir`. Methods raise OSError when the store fails."""

    def __init__(self, uri: str, run_dir: Path) -> None:
        self.uri, self._run_dir = uri, run_dir
        self._store, path = _open_store(uri)
        self._root = f"{path}/{run_dir.name}"
        self._claim: str | None = None

    def __str__(self) -> str:
        return f"{self.uri.partition('?')[0]}/{self._run_dir.name}"

    def claim(self) -> None:
        """Claim the mirror: earlier claimants may no longer seal or remove a folder."""
        self._claim = uuid.uuid4().hex
        self._write(OWNER, io.BytesIO(self._claim.encode()))

    def _check_claim(self) -> None:
        """Raise if another worker group has claimed the mirror.

        When the head node is lost, workers outlive their job for minutes.
        """
        if self._claim is not None and self.read(OWNER) != self._claim:
            raise PermissionError(f"another worker group of run {self._run_dir.name} has started")

    def is_folder(self, folder: Path) -> bool:
        """Return whether the mirror would be written to `folder`."""
        return self._store.type_name == "local" and Path(self._root).resolve() == folder.resolve()

    def checkpoints(self) -> list[str]:
        """Return the names of the complete checkpoints, newest first."""
        return [name for name, complete in self._folders() if complete]

    def read(self, name: str) -> str:
        """Return the text of a small file.

        Raises:
            FileNotFoundError: the mirror does not have it.
        """
        with self._store.open_input_stream(f"{self._root}/{name}") as stream:
            return stream.read().decode()

    def manifest(self, folder: str) -> dict[str, Entry]:
        """Return the files of a complete folder.

        Raises:
            ValueError: the manifest is damaged.
        """
        return files.files_of(self.read(f"{folder}/{MANIFEST}"))

    def put(self, names: Iterable[str]) -> None:
        """Upload files, given by their paths in the run's folder."""
        for name in names:
            with (self._run_dir / name).open("rb") as file:
                self._write(name, file)

    def get(self, name: str, entry: Entry | None = None, into: Path | None = None) -> str | None:
        """Fetch a file; return what is wrong with it, or None.

        Args:
            entry: its size and digest; a local file that matches is not fetched again.
            into: target folder instead of the run's folder.
        """
        target = (into or self._run_dir) / name
        if entry is not None and _matches(target, entry):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.atomic_path(target) as partial:
                with (
                    self._store.open_input_stream(f"{self._root}/{name}") as stream,
                    partial.open("wb") as file,
                ):
                    shutil.copyfileobj(stream, file, CHUNK)
                if entry is not None and not _matches(partial, entry):
                    raise _Damaged(partial.stat().st_size)
        except FileNotFoundError:
            return f"{name} is missing in {self}"
        except _Damaged as error:
            if error.size != entry["bytes"]:
                return f"{name} has {error.size} bytes instead of {entry['bytes']} in {self}"
            return f"{name} was altered in {self}: its SHA-256 differs from the manifest"
        return None

    def seal(self, folder: str, entries: dict[str, Entry]) -> None:
        """Write the manifest of a folder, which declares it complete.

        Raises:
            OSError: another worker group has claimed the mirror.
        """
        self._check_claim()
        self._write(f"{folder}/{MANIFEST}", io.BytesIO(files.manifest_text(entries).encode()))

    def remove(self, folder: str) -> None:
        """Remove a folder, its manifest first.

        Raises:
            OSError: another worker group has claimed the mirror.
        """
        self._check_claim()
        path = f"{self._root}/{folder}"
        for name in (f"{path}/{MANIFEST}", path):
            kind = self._store.get_file_info(name).type
            if kind == fs.FileType.File:
                self._store.delete_file(name)
            elif kind == fs.FileType.Directory:
                self._store.delete_dir(name)

    def prune(self, keep: Iterable[str]) -> None:
        """Remove all checkpoints but `keep`, incomplete uploads included."""
        for name, _ in self._folders():
            if name not in keep:
                self.remove(name)

    def _folders(self) -> list[tuple[str, bool]]:
        """Return (name, complete) of the checkpoints, newest first."""
        infos = self._store.get_file_info(
            fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        )
        folders: dict[str, bool] = {}
        for info in infos:
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


class _Damaged(Exception):
    """A fetched file differs from its manifest."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def _matches(path: Path, entry: Entry) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == entry["bytes"]
        and files.sha256(path) == entry["sha256"]
    )


def _open_store(uri: str) -> tuple[fs.FileSystem, str]:
    """Return (file system, path in it)."""
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


@contextmanager
def user_mistakes(uri: str) -> Iterator[None]:
    """Raise the store's errors as a ValueError of one line."""
    try:
        yield
    except (OSError, pyarrow.ArrowInvalid) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"cluster.mirror: {uri} cannot be used: {text}; check the address, that the bucket"
            " exists, and the credentials in the environment"
        ) from error


# --- What the driver does with it ---


def open_mirror(cluster: ClusterConfig, run_dir: Path) -> Mirror | None:
    """Open and list the mirror of a run; None if the recipe has none.

    Raises:
        ValueError: it cannot be opened.
    """
    if cluster.mirror is None:
        return None
    with user_mistakes(cluster.mirror):
        mirror = Mirror(cluster.mirror, run_dir)
        mirror.checkpoints()
    if mirror.is_folder(run_dir):
        raise ValueError(f"cluster.mirror: {cluster.mirror} is cluster.storage itself")
    return mirror


def last_state(run_dir: Path, mirror: Mirror | None) -> tuple[str, TrainState] | None:
    """Return (where, state) of the newest checkpoint in the folder or the mirror; None if none.

    The files are checked by `quick_fault`, as the driver sees them.

    Raises:
        ValueError: there are checkpoints and all are damaged, or the mirror fails.
    """
    if mirror is None:
        path = find_checkpoint(run_dir)
        return None if path is None else (str(path), read_state(path))
    with user_mistakes(mirror.uri):
        complete = (p for p in list_checkpoints(run_dir) if quick_fault(p) is None)
        local, mirrored = next(complete, None), next(iter(mirror.checkpoints()), None)
        if local is not None and (mirrored is None or local.name >= mirrored):
            return str(local), read_state(local)
        if mirrored is None:
            return None
        where = f"{mirror}/{mirrored}"
        return where, parse_state(mirror.read(f"{mirrored}/{STATE_FILE}"), where)


def put_files(mirror: Mirror | None, *names: str) -> None:
    """Upload files of the run, if it has a mirror.

    Raises:
        ValueError: the mirror cannot be written.
    """
    if mirror is not None:
        with user_mistakes(mirror.uri):
            mirror.put(names)


def put_folder(mirror: Mirror, folder: Path) -> None:
    """Upload a folder that one rank has written."""
    entries = files.describe_files(folder, [p for p in folder.rglob("*") if p.is_file()])
    mirror.remove(folder.name)
    mirror.put(f"{folder.name}/{name}" for name in entries)
    mirror.seal(folder.name, entries)


def get_folder(mirror: Mirror | None, folder: Path) -> None:
    """Fetch a folder that `put_folder` uploaded, unless it exists.

    Raises:
        OSError: it is damaged, or the mirror fails.
    """
    if mirror is None or folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}.partial")  # kept if interrupted, and completed
    for name, entry in mirror.manifest(folder.name).items():
        fault = mirror.get(f"{folder.name}/{name}", entry, into=partial)
        if fault is not None:
            raise OSError(fault)
    files.replace_folder(partial / folder.name, folder)
    partial.rmdir()


def find_model(cluster: ClusterConfig, run_dir: Path, script: str) -> Path:
    """Return the model of the run in `run_dir`, fetched from the mirror if necessary.

    Args:
        script: the job that makes the model, for the error.

    Raises:
        ValueError: the run has no model yet.
    """
    model = run_dir / "model"
    if not model.is_dir():
        with suppress(FileNotFoundError):  # missing in the mirror too
            get_folder(open_mirror(cluster, run_dir), model)
    if not model.is_dir():
        also = f" or cluster.mirror {cluster.mirror}" if cluster.mirror else ""
        raise ValueError(
            f"{run_dir}: no model/ to evaluate; --run-id must name a finished run of {script} in"
            f" cluster.storage {cluster.storage}{also}"
        )
    return model


# --- What the ranks do with it ---


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
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        #: Process group of all ranks with the long storage timeout.
        self.group, self._copy_group = groups
        self._timeout = timedelta(seconds=timeout_s)
        self._thread: Thread | None = None
        self._newest: Path | None = None
        self._mirrored: set[str] = set()  # complete checkpoints in the mirror, same on all ranks
        self._folder_ranks = folder_ranks
        self._leads_folder = self._rank == folder_ranks[0]

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
        """Return the newest intact checkpoint, or None; missing or altered files are fetched.

        Contents are compared with the manifest; each rank reads a share of the files. Logs a line
        for each checkpoint that is skipped.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        # rank 0 lists for all: other nodes may see a shared folder a moment later
        listing: list[set[str] | None] = [None, None]
        if self._rank == 0:
            listing = [{path.name for path in list_checkpoints(self._run_dir)}, set()]
            if self._mirror is not None:
                listing[1] = set(self._mirror.checkpoints())
                if not (self._run_dir / LOG).exists():
                    self._mirror.get(LOG)
        dist.broadcast_object_list(listing, group=self.group)
        local, self._mirrored = listing

        faults: list[str] = []
        for name in sorted(local | self._mirrored, reverse=True):
            path = self._run_dir / name
            fault = self._first_fault(self._fault(path), self.group)
            if fault is not None and name in self._mirrored:
                self._log(f"{name}: {fault}; fetching it from {self._mirror}")
                fault = self._fetch(path)
            if fault is None:
                self._newest = path
                return path
            faults.append(f"{name}: {fault}")
            self._log(f"{faults[-1]}; skipped, trying the previous checkpoint")
        if len(self._folder_ranks) == self._world_size or self._mirrored:
            raise_if_all_damaged(self._run_dir, faults)
        # else each node has a part, and no upload was completed: there never was a checkpoint
        return None

    @property
    def newest(self) -> Path | None:
        """The checkpoint that `find` returned, or the one that was saved last."""
        return self._newest

    def make_universal(self, checkpoint: Path, stage: int) -> None:
        """Convert a checkpoint so that any number of workers can load it."""
        make_universal(checkpoint, stage, self._folder_ranks, self.group)

    def load(self, engine: Any, checkpoint: Path, universal: bool) -> None:
        """Load weights, optimizer and learning-rate schedule, on all ranks."""
        with self._storage_timeout():
            load_checkpoint(engine, checkpoint, universal)
            dist.barrier(group=self.group)

    def save(self, engine: Any, state: TrainState, recipe_text: str, keep: int) -> None:
        """Write a checkpoint, start to mirror it, and remove all but `keep` older ones.

        Waits until the previous one is mirrored.
        """
        with self._storage_timeout():
            checkpoint = save_checkpoint(
                engine, self._run_dir, state, recipe_text, self._folder_ranks, self.group
            )
        self.wait()
        if self._leads_folder:
            prune_checkpoints(self._run_dir, state.step, keep, state.best_step)
        self._newest = checkpoint
        if self._mirror is not None:
            names = {*self._mirrored, checkpoint.name}
            names_to_keep = checkpoints_to_keep(names, state.step, keep, state.best_step)
            self._thread = Thread(target=self._copy, args=(self._mirror, checkpoint, names_to_keep))
            self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is mirrored."""
        if self._thread is not None:
            if self._thread.is_alive():
                self._log("waiting until the checkpoint is mirrored")
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait, then mirror the last checkpoint, if that has failed before, and `model/`.

        Raises:
            OSError: one of them cannot be copied.
        """
        self.wait()
        if self._mirror is None:
            return
        if self._newest is not None and self._newest.name not in self._mirrored:
            self._copy(self._mirror, self._newest, {*self._mirrored, self._newest.name})
            if self._newest.name not in self._mirrored:
                raise OSError(f"{self._newest.name} could not be copied to {self._mirror}")
        if self._rank == 0:
            put_folder(self._mirror, self._run_dir / "model")

    @contextmanager
    def _storage_timeout(self) -> Iterator[None]:
        """Use the long storage timeout for DeepSpeed's own barriers during checkpoint I/O."""
        dist.set_timeout(timedelta(hours=STORAGE_HOURS))
        yield
        dist.set_timeout(self._timeout)

    def _copy(self, mirror: Mirror, checkpoint: Path, names_to_keep: set[str]) -> None:
        """Copy the files of all ranks, then the manifest, then prune; in a thread, collective."""
        name, began = checkpoint.name, time.monotonic()
        entries = files.files_of((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        # if more ranks have written it, the present ones share the files
        rank_files = [
            f"{name}/{file}"
            for file in entries
            if (shard_rank(file) or 0) % self._world_size == self._rank
        ]

        def complete() -> None:
            mirror.put([LOG])
            mirror.seal(name, entries)
            mirror.prune(names_to_keep)

        fault = (
            self._on_all_ranks(lambda: mirror.remove(name) if self._rank == 0 else None)
            or self._on_all_ranks(lambda: mirror.put(rank_files))
            or self._on_all_ranks(lambda: complete() if self._rank == 0 else None)
        )
        if fault is not None:
            self._log(f"{name} was not copied to {mirror}: {fault}")
            return
        self._mirrored = {*(self._mirrored & names_to_keep), name}
        size = sum(entry["bytes"] for entry in entries.values()) / 1e6
        seconds = time.monotonic() - began
        self._log(f"{name} copied to {mirror} ({size:.1f} MB in {seconds:.1f} s)")

    def _on_all_ranks(self, work: Callable[[], None]) -> str | None:
        """Do `work` on every rank; return the error of the lowest rank that failed."""
        fault = None
        try:
            work()
        except OSError as error:
            fault = f"rank {self._rank}: {' '.join(str(error).split())}"
        return self._first_fault(fault, self._copy_group)

    def _first_fault(self, fault: str | None, group: dist.ProcessGroup) -> str | None:
        """Return the fault of the lowest rank that has one; collective."""
        if self._world_size == 1:
            return fault
        faults: list[str | None] = [None] * self._world_size
        dist.all_gather_object(faults, fault, group=group)
        return next((text for text in faults if text is not None), None)

    def _fault(self, path: Path) -> str | None:
        """Check this rank's share of the files in its folder."""
        share = self._folder_ranks.index(self._rank)
        return files.fault(path, True, share, len(self._folder_ranks), self._needed)

    def _needed(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """Select the files that this rank's folder must contain.

        These are the shards of its ranks, and the files that all ranks read. If the world size has
        changed, every folder needs all files, since each is converted by itself.
        """
        shards = {shard_rank(name) for name in entries} - {None}
        if shards and shards != set(range(self._world_size)):
            return entries
        return {k: v for k, v in entries.items() if shard_rank(k) in {None, *self._folder_ranks}}

    def _fetch(self, path: Path) -> str | None:
        """Fetch the missing files of a mirrored checkpoint; return what is wrong, or None."""
        manifest: list[dict[str, Entry] | str | None] = [None]
        if self._rank == 0:
            try:
                manifest = [self._mirror.manifest(path.name)]
            except ValueError as error:
                manifest = [str(error)]
        dist.broadcast_object_list(manifest, group=self.group)
        [entries] = manifest
        if isinstance(entries, str):
            return entries
        if self._leads_folder:
            _prepare_folder(path, entries)
        dist.barrier(group=self.group)

        # the ranks of a folder share its files
        share = self._folder_ranks.index(self._rank)
        fault = None
        for name, entry in list(self._needed(entries).items())[share :: len(self._folder_ranks)]:
            fault = fault or self._mirror.get(f"{path.name}/{name}", entry)
        fault = self._first_fault(fault, self.group)
        if fault is None and self._leads_folder:
            files.write_manifest(path, entries)
        dist.barrier(group=self.group)
        return fault

    def _log(self, text: str) -> None:
        if self._rank == 0:
            event(self._run_dir, text)


def _ranks_sharing(folder: Path, group: dist.ProcessGroup) -> list[int]:
    """Return the ranks that see the same folder: each writes a file and looks for the others'."""
    rank = dist.get_rank()
    token = [f".here-{uuid.uuid4().hex}" if rank == 0 else None]
    dist.broadcast_object_list(token, group=group)
    folder.mkdir(parents=True, exist_ok=True)
    probes = [folder / f"{token[0]}-{other}" for other in range(dist.get_world_size())]
    probes[rank].touch()
    dist.barrier(group=group)
    ranks = [other for other, probe in enumerate(probes) if probe.exists()]
    dist.barrier(group=group)
    probes[rank].unlink()
    return ranks


def _prepare_folder(path: Path, entries: dict[str, Entry]) -> None:
    """Make the folder of a checkpoint; files of another checkpoint are removed, its own stay."""
    if path.is_dir():
        try:
            text = (path / MANIFEST).read_text(encoding="utf-8")
            same = files.files_of(text) == entries
        except (FileNotFoundError, ValueError):
            same = False
        if same:
            return
        shutil.rmtree(path)
    path.mkdir()
