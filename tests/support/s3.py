"""An S3 server on the loopback (moto's) in its own process; skips if moto is not installed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import fs

from fmray.train.mirror import Mirror

BUCKET = "checkpoints"
CLONE_NEWNS = 0x00020000  # linux/sched.h; os.unshare comes with Python 3.12
# eight steps with a checkpoint after 3, 6 and 8, of which two are kept
MIRRORED = {"lr": 2e-3, "steps": 8, "global_batch": 16, "eval_rows": 8}
MIRRORED |= {"checkpoint_every": 3, "keep_checkpoints": 2}
NAMES = [f"checkpoint-0000000{step}" for step in (3, 6, 8)]
SERVER = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
server._thread.join()
"""


class S3:
    """A client of a server at `address` (HOST:PORT), with an empty bucket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.store = fs.S3FileSystem(
            endpoint_override=address, scheme="http", allow_bucket_creation=True
        )
        self.store.create_dir(BUCKET)

    def uri(self, prefix: str, bucket: str = BUCKET) -> str:
        """Return a value for `cluster.mirror`."""
        return f"s3://{bucket}/{prefix}?scheme=http&endpoint_override={self.address}"

    def names(self, prefix: str) -> set[str]:
        """Return the names of the objects below a prefix."""
        infos = self.store.get_file_info(fs.FileSelector(f"{BUCKET}/{prefix}", recursive=True))
        start = len(f"{BUCKET}/{prefix}/")
        return {info.path[start:] for info in infos if info.type == fs.FileType.File}

    def write(self, name: str, data: bytes) -> None:
        with self.store.open_output_stream(f"{BUCKET}/{name}") as stream:
            stream.write(data)

    def read(self, name: str) -> bytes:
        with self.store.open_input_stream(f"{BUCKET}/{name}") as stream:
            return stream.read()


@contextmanager
def s3_server() -> Iterator[S3]:
    """Start the server, with credentials in the environment."""
    pytest.importorskip("moto.server", reason="moto is not installed: no S3 server to test against")
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(dict(zip(keys, ("test", "test", "us-east-1"), strict=True)))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = server.stdout.readline().strip()
        assert port.isdigit(), f"the S3 server did not start: {port!r}"
        yield S3(f"127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def own_folder(folder: Path, rank: int) -> None:
    """Give this process its own `folder`, as on its own machine: a private mount of
    `<folder>-<rank>`. Needs root."""
    private = folder.with_name(f"{folder.name}-{rank}")
    for path in (folder, private):
        path.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", private, folder], check=True)


def die_while_copying(name: str, rank: int) -> None:
    """Kill rank 1 once it has started to copy its files of the checkpoint `name`."""
    put = Mirror.put

    def put_and_die(mirror: Mirror, names: Iterable[str]) -> None:
        names = list(names)
        if names[0].startswith(name):
            put(mirror, names[:1])
            os.kill(os.getpid(), signal.SIGKILL)
        put(mirror, names)

    if rank == 1:
        Mirror.put = put_and_die
