"""A process that decodes the images of requests: `python -m fmray.serve.image_worker ...`.

Decoders are C code that reads what strangers send. Here they have no key, little memory and little
time, and the replica survives whatever they do. The process imports Pillow and numpy, not torch.
`fmray.serve.image_pool` starts it; they talk over a socket:

    pool -> process    JSON {"urls": number, "max_pixels": ...}, then each URL
    process -> pool    JSON {"error": text} or {"images": [{"size", "digest"}]}

Before the second reply it writes the pixels, three bytes each, to a file in memory that they share:
unlike a socket, that takes them in one piece. The process ends when the pool closes the socket.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

from fmray.serve.images import read_images

READY = b"ready"
MAX_REPLY = 64 * 1024  # bytes of JSON


def main(socket: int, pixels: int, memory_mib: int, seconds: float) -> None:
    """Serve requests until the pool closes the socket.

    Args:
        socket: File descriptor, as `pixels`.
        memory_mib: Limit on the address space of this process.
        seconds: Limit per request. The pool ends the process first, unless it has died itself.
    """
    connection = Connection(socket)
    os.nice(5)  # the replica answers the others first
    for limit, value in ((resource.RLIMIT_AS, memory_mib * 2**20), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    # From here on libraries would only write warnings about what they decode.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    connection.send_bytes(READY)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
            urls = [connection.recv_bytes().decode() for _ in range(request["urls"])]
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # the signal's default ends the process
        _answer(connection, pixels, urls, request["max_pixels"])
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(connection: Connection, pixels: int, urls: list[str], max_pixels: int) -> None:
    written = 0
    try:
        images = read_images(urls, max_pixels)
        for item in images:
            written += os.pwrite(pixels, item.image.tobytes(), written)
    except ValueError as error:
        reply = {"error": str(error)}
    except MemoryError:
        reply = {"error": "the images take more memory than they may to decode"}
    else:
        reply = {"images": [{"size": item.image.size, "digest": item.digest} for item in images]}
    connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C ends the replica, which ends this
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
