"""Processes that decode the images of requests, bounded in time and memory, shared fairly.

An image can keep a decoder busy or make it fail in ways that no check of its header foresees. So
each request's images are decoded in a process (`fmray.serve.image_worker`) that is killed and
replaced if it takes too long; the request gets an error, all others are unaffected. One caller's
images use all processes but one, and callers take turns by the time that their images took.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image

import fmray
from fmray.engine.fairness import FairQueue
from fmray.serve.image_worker import MAX_REPLY, READY
from fmray.serve.images import Decode, RequestImage
from fmray.serve.openai import ApiError

_logger = logging.getLogger("fmray.serve")
_START_SECONDS = 60.0
# What a process needs to find its libraries. It gets no other variable: some hold keys.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
# One thread, and large buffers return to the system (glibc).
_SMALL = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**23),
    "MALLOC_TRIM_THRESHOLD_": str(2**23),
}

Result = TypeVar("Result")


class ImageProcess:
    """A process that decodes images, replaced whenever it ends. Used by one thread at a time."""

    def __init__(self, seconds: float, memory_mib: int) -> None:
        """Limit each call of `decode` to `seconds`, and the process to `memory_mib`."""
        self._seconds, self._memory_mib = seconds, memory_mib
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self._pixels: IO[bytes]
        self._ready = self._closed = False

    @property
    def pid(self) -> int | None:
        """The process's id; None if none was started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start a process, without waiting until it is ready."""
        if self._closed:
            raise RuntimeError("the replica stops")
        ours, theirs = socket.socketpair()
        limit = struct.pack("ll", int(self._seconds), int(self._seconds % 1 * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        self._connection = Connection(ours.detach())
        self._pixels = _unnamed_file()
        paths = [str(Path(fmray.__file__).parents[1]), *(path for path in sys.path if path)]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(paths), **_SMALL}
        descriptors = (theirs.fileno(), self._pixels.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-S", "-m", "fmray.serve.image_worker",
                    *map(str, (*descriptors, self._memory_mib, self._seconds)),
                ],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )  # fmt: skip
        self._ready = False

    def wait(self) -> None:
        """Wait until the process accepts images; start one if none runs.

        Raises:
            RuntimeError: If it ends or hangs instead.
        """
        if self._process is None:
            self.start()
        elif self._process.poll() is not None:  # the system may have ended it
            self._connection.close()
            self.start()
        if self._ready:
            return
        with contextlib.suppress(EOFError, OSError):
            if self._connection.poll(_START_SECONDS):
                self._ready = self._connection.recv_bytes() == READY
        if not self._ready:
            self._process.kill()
            raise RuntimeError("the process that decodes images does not start")

    def close(self) -> None:
        """End the process, also while another thread uses it."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def decode(self, urls: list[str], max_pixels: int) -> list[RequestImage]:
        """Decode the images of a request as `read_images` does.

        Raises:
            ValueError: If one of them is not accepted, or they take too long.
        """
        for _ in range(2):  # once more, for the process may have been ended from outside
            self.wait()
            try:
                return self._exchange(urls, max_pixels)
            except BlockingIOError:  # the socket's time limit
                self._replace()
                raise ValueError(
                    f"the images take longer than {self._seconds:g} s to decode"
                ) from None
            except (EOFError, OSError):
                self._replace()
        raise ValueError("the images make the decoder fail")

    def _replace(self) -> None:
        """Start another process."""
        self._process.kill()  # it may have closed its socket only
        code = self._process.wait()
        self._connection.close()
        _logger.warning("a process that decodes images is replaced; its exit code: %d", code)
        self.start()

    def _exchange(self, urls: list[str], max_pixels: int) -> list[RequestImage]:
        connection = self._connection
        connection.send_bytes(json.dumps({"urls": len(urls), "max_pixels": max_pixels}).encode())
        for url in urls:
            connection.send_bytes(url.encode())
        reply = json.loads(connection.recv_bytes(MAX_REPLY))
        if "error" in reply:
            raise ValueError(reply["error"])
        images, start = [], 0
        for item in reply["images"]:
            width, height = item["size"]
            if width * height > max_pixels:
                raise EOFError  # not what it was asked for: it must be replaced
            pixels = os.pread(self._pixels.fileno(), 3 * width * height, start)
            start += len(pixels)
            image = Image.frombytes("RGB", (width, height), pixels)
            images.append(RequestImage(image, item["digest"], width * height))
        self._pixels.truncate(0)  # returns the memory
        return images


def _unnamed_file() -> IO[bytes]:
    """Return a file that no other process can open, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fmray-pixels"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@dataclass(eq=False)
class _Turn:
    """A request that waits for a process."""

    owner: str
    process: asyncio.Future[ImageProcess]


class ImagePool:
    """A fixed number of processes, each with a thread, for requests of one event loop."""

    def __init__(self, processes: int, seconds: float, memory_mib: int, max_waiting: int) -> None:
        """Bound the requests that wait.

        Args:
            seconds: Limit for decoding the images of one request.
            memory_mib: Limit on the memory of each process.
            max_waiting: Largest number of waiting requests of one owner.
        """
        self._processes = [ImageProcess(seconds, memory_mib) for _ in range(processes)]
        self._free = list(self._processes)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="fmray-images")
        self._queue: FairQueue[_Turn] = FairQueue()
        self._max_waiting, self._waiting = max_waiting, Counter[str]()
        self._max_running, self._running = max(1, processes - 1), Counter[str]()

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    def start(self) -> None:
        """Start all processes and wait until they are ready.

        Raises:
            RuntimeError: If they do not start.
        """
        for process in self._processes:
            process.start()
        for process in self._processes:
            process.wait()

    def close(self) -> None:
        """End all processes; the requests that they had fail."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.close()

    async def run(
        self, task: Callable[[Decode], Result], owner: str, weight: float = 1.0
    ) -> Result:
        """Run a task in a thread, with a `decode` that uses a process of the pool.

        A cancelled task that waits is dropped; one that runs keeps its process until it ends.

        Args:
            owner: Whose turn it takes.
            weight: Of the owner, relative to others' 1.

        Raises:
            ApiError: 429 if the owner has too many requests waiting.
        """
        process = await self._take(owner, weight)
        start = time.monotonic()
        running = asyncio.get_running_loop().run_in_executor(self._threads, task, process.decode)

        def release(done: asyncio.Future[Result]) -> None:
            if not done.cancelled():
                done.exception()  # is reported by the request, if that still waits
            self._release(process, owner, time.monotonic() - start)

        running.add_done_callback(release)
        return await asyncio.shield(running)

    async def _take(self, owner: str, weight: float) -> ImageProcess:
        """Wait for the owner's turn and return a process."""
        if self._waiting[owner] >= self._max_waiting:
            raise ApiError(
                429,
                f"{self._max_waiting} of your requests with images are waiting already; retry",
                code="overloaded",
                headers={"retry-after": "1"},
            )
        turn = _Turn(owner, asyncio.get_running_loop().create_future())
        self._queue.push(turn, owner, weight)
        self._waiting[owner] += 1
        self._dispatch()
        try:
            return await turn.process
        except asyncio.CancelledError:
            if turn.process.cancelled():
                self._queue.remove(turn)
            else:
                self._release(turn.process.result(), owner, 0.0)
            raise
        finally:
            _decrease(self._waiting, owner)

    def _dispatch(self) -> None:
        """Give free processes to those whose turn it is."""
        while self._free:
            busy = {owner for owner, count in self._running.items() if count >= self._max_running}
            turn = self._queue.next(busy)
            if turn is None:
                return
            self._queue.serve(0.0, busy)  # `settle` charges the time that it takes
            if not turn.process.cancelled():
                self._running[turn.owner] += 1
                turn.process.set_result(self._free.pop())

    def _release(self, process: ImageProcess, owner: str, seconds: float) -> None:
        self._free.append(process)
        _decrease(self._running, owner)
        self._queue.settle(owner, seconds)
        self._dispatch()


def _decrease(counts: Counter[str], name: str) -> None:
    """Subtract one, and drop a count of zero: there are as many names as callers."""
    counts[name] -= 1
    if not counts[name]:
        del counts[name]
