"""The processes that decode images: same pixels, bounded, replaced, and shared fairly."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.serving import (
    ScriptedWorker,
    chat,
    client_of,
    data_url,
    encoded_image,
    make_app,
    make_chat_model,
    post_in_memory,
    wait_until,
)

from fmray.serve.image_pool import ImagePool, ImageProcess
from fmray.serve.images import read_images
from fmray.serve.openai import ApiError
from fmray.serve.replica import ChatModel

RED = data_url(encoded_image())
MEMORY_MIB = 1024


@pytest.fixture(scope="module")
def process() -> Iterator[ImageProcess]:
    made = ImageProcess(seconds=20, memory_mib=MEMORY_MIB)
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[ImageProcess]:
    """A process with little time."""
    made = ImageProcess(seconds=1.5, memory_mib=MEMORY_MIB)
    made.wait()
    yield made
    made.close()


# -- one process -------------------------------------------------------------------------------


def test_pixels_equal_those_of_this_process(process: ImageProcess) -> None:
    urls = [
        data_url(encoded_image((40, 30), "green", "JPEG"), "image/jpeg"),
        data_url(encoded_image((7, 5), (1, 2, 3, 128), "PNG", "RGBA")),
        data_url(encoded_image((9, 9), "blue", "WEBP"), "image/webp"),
    ]
    expected, decoded = read_images(urls, 10_000), process.decode(urls, 10_000)
    for one, other in zip(expected, decoded, strict=True):
        assert one.image.tobytes() == other.image.tobytes() and one.image.size == other.image.size
        assert (one.digest, one.pixels) == (other.digest, other.pixels)


@pytest.mark.parametrize("url", ["https://example.com/a.png", RED[:80], data_url(b"GIF89a")])
def test_errors_equal_those_of_this_process(process: ImageProcess, url: str) -> None:
    with pytest.raises(ValueError) as expected:
        read_images([RED, url], 10_000)
    with pytest.raises(ValueError) as raised:
        process.decode([RED, url], 10_000)
    assert str(raised.value) == str(expected.value)
    assert len(process.decode([RED], 10_000)) == 1


def test_process_is_small_and_knows_no_secret(
    process: ImageProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMRAY_API_KEYS", "sk-0123456789abcdef")
    process.close()
    process._closed = False
    process.decode([RED], 10_000)
    folder = Path(f"/proc/{process.pid}")
    assert b"0123456789abcdef" not in (folder / "environ").read_bytes()
    assert "torch" not in (folder / "maps").read_text()


def test_process_that_hangs_is_replaced(hasty: ImageProcess) -> None:
    stuck = hasty.pid
    os.kill(stuck, signal.SIGSTOP)
    with pytest.raises(ValueError, match=r"take longer than 1.5 s to decode"):
        hasty.decode([RED], 10_000)
    assert hasty.pid != stuck
    assert len(hasty.decode([RED], 10_000)) == 1


def test_process_that_was_killed_is_replaced_and_the_image_decoded(process: ImageProcess) -> None:
    process.wait()
    os.kill(process.pid, signal.SIGKILL)
    assert len(process.decode([RED], 10_000)) == 1


def test_image_that_ends_the_process_is_an_error(
    process: ImageProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        os.kill(process.pid, signal.SIGSEGV)
        raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr(process, "_exchange", crash)
        with pytest.raises(ValueError, match="make the decoder fail"):
            process.decode([RED], 10_000)
    assert len(process.decode([RED], 10_000)) == 1


def test_memory_is_bounded() -> None:
    small = ImageProcess(seconds=20, memory_mib=256)
    try:
        small.wait()
        pid = small.pid
        large = data_url(encoded_image((6000, 6000), kind="PNG"))
        with pytest.raises(ValueError, match="memory"):
            small.decode([large], 40_000_000)
        assert len(small.decode([RED], 10_000)) == 1
        assert small.pid == pid, "the process need not end"
    finally:
        small.close()


def test_process_ends_with_the_replica() -> None:
    orphan = ImageProcess(seconds=20, memory_mib=MEMORY_MIB)
    orphan.wait()
    orphan._connection.close()  # as the system does when a process dies
    wait_until(lambda: orphan._process.poll() is not None, 20, "the end of the process")


# -- the pool: tasks that decode nothing need no process ----------------------------------------


def pool_of(processes: int, max_waiting: int = 100) -> ImagePool:
    return ImagePool(processes, seconds=20, memory_mib=MEMORY_MIB, max_waiting=max_waiting)


async def settled() -> None:
    """Let all tasks run that can."""
    for _ in range(5):
        await asyncio.sleep(0.01)


def test_one_caller_leaves_a_process_to_the_others() -> None:
    async def run() -> None:
        pool, hold = pool_of(3), threading.Event()
        blocked = [
            asyncio.create_task(pool.run(lambda _: hold.wait(20), "mallory")) for _ in range(9)
        ]
        await settled()
        async with asyncio.timeout(10):
            assert await pool.run(lambda _: "mine", "alice") == "mine"
        assert not any(task.done() for task in blocked)
        hold.set()
        await asyncio.gather(*blocked)
        pool.close()

    asyncio.run(run())


def test_callers_take_turns() -> None:
    async def run() -> list[str]:
        pool, hold, order = pool_of(1), threading.Event(), list[str]()

        def task(name: str) -> Callable[[Any], None]:
            return lambda _: (hold.wait(20), order.append(name), time.sleep(0.01))

        jobs = [asyncio.create_task(pool.run(task("a"), "alice")) for _ in range(6)]
        await settled()
        jobs += [asyncio.create_task(pool.run(task("b"), "bob")) for _ in range(2)]
        await settled()
        hold.set()
        await asyncio.gather(*jobs)
        pool.close()
        return order

    order = asyncio.run(run())
    assert len(order) == 8
    assert max(index for index, name in enumerate(order) if name == "b") < 6, order


def test_too_many_waiting_requests_of_one_caller_are_refused() -> None:
    async def run() -> None:
        pool, hold = pool_of(1, max_waiting=2), threading.Event()
        jobs = [asyncio.create_task(pool.run(lambda _: hold.wait(20), "a")) for _ in range(3)]
        await settled()
        with pytest.raises(ApiError, match="2 of your requests") as refused:
            await pool.run(lambda _: None, "a")
        assert refused.value.status == 429 and refused.value.headers["retry-after"]
        other = asyncio.create_task(pool.run(lambda _: "other", "b"))
        await settled()
        hold.set()
        assert await other == "other"
        await asyncio.gather(*jobs)
        assert await pool.run(lambda _: "again", "a") == "again"
        pool.close()

    asyncio.run(run())


def test_cancelled_requests_are_dropped_and_return_their_process() -> None:
    async def run() -> None:
        pool, hold, ran = pool_of(1), threading.Event(), list[int]()
        running = asyncio.create_task(pool.run(lambda _: hold.wait(20), "a"))
        await settled()
        waiting = [
            asyncio.create_task(pool.run(lambda _, number=number: ran.append(number), "a"))
            for number in range(3)
        ]
        await settled()
        for task in (running, waiting[0], waiting[2]):
            task.cancel()
        await settled()
        assert running.done() and not waiting[1].done(), "the process is still in use"
        hold.set()
        await waiting[1]
        assert ran == [1]
        assert not pool._waiting and not len(pool._queue) and len(pool._free) == 1
        pool.close()

    asyncio.run(run())


def test_failed_task_returns_its_process() -> None:
    async def run() -> None:
        pool = pool_of(1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await pool.run(lambda _: 1 / 0, "a")
        pool.close()

    asyncio.run(run())


# -- the replica -------------------------------------------------------------------------------


@pytest.fixture
def replica(directory: Path, worker: ScriptedWorker) -> Iterator[ChatModel]:
    """A replica with one process; health checks and images have little time."""
    made = make_chat_model(directory, worker, image_processes=1, health_timeout_s=3.0)
    made.images.start()
    yield made
    made.images.close()


def test_text_is_answered_while_images_hang(replica: ChatModel) -> None:
    """Images that hang become errors; the replica is not ready meanwhile, and recovers."""

    async def run() -> None:
        async with client_of(make_app(replica)) as client:
            path = "/v1/chat/completions"
            [pid] = replica.images.pids
            os.kill(pid, signal.SIGSTOP)
            with_image = asyncio.create_task(client.post(path, json=chat(RED)))
            await settled()
            text = await client.post(path, json=chat())
            assert text.status_code == 200 and not with_image.done()
            failed = await with_image
            assert failed.status_code == 400
            assert failed.json()["error"]["code"] == "invalid_image"
            assert "longer than 1.5 s" in failed.json()["error"]["message"]
            assert (await client.post(path, json=chat(RED))).status_code == 200

    asyncio.run(run())


def test_blocked_pool_makes_the_replica_unhealthy(replica: ChatModel) -> None:
    async def run() -> None:
        async with client_of(make_app(replica)) as client:
            assert (await client.get("/readyz")).status_code == 200
            replica._last_health_answer = None
            hold = threading.Event()
            stuck = asyncio.create_task(replica.images.run(lambda _: hold.wait(30), "a"))
            await settled()
            assert (await client.get("/readyz")).status_code == 503
            hold.set()
            await stuck
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(run())


def test_health_check_sends_an_image(replica: ChatModel, worker: ScriptedWorker) -> None:
    asyncio.run(replica.check_health())
    [ask] = worker.asks
    assert "pixel_values" in ask.inputs and ask.image_key is None


@pytest.mark.parametrize("stream", [False, True])
def test_waiting_image_of_a_client_that_left_is_dropped(
    replica: ChatModel, worker: ScriptedWorker, stream: bool
) -> None:
    async def run() -> None:
        hold, disconnect = threading.Event(), asyncio.Event()
        stuck = asyncio.create_task(replica.images.run(lambda _: hold.wait(30), "a"))
        await settled()
        client = asyncio.create_task(
            post_in_memory(make_app(replica), chat(RED, stream=stream), disconnect)
        )
        await settled()
        assert len(replica.images._queue) == 1
        disconnect.set()
        await asyncio.wait_for(client, 10)
        assert len(replica.images._queue) == 0
        hold.set()
        await stuck
        await settled()
        assert not worker.asks

    asyncio.run(run())
