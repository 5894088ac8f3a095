"""What a Ray session opens to the network: addresses, token, and which are reachable from outside.

Whoever may call Ray's ports can run code, so a cluster that fmray starts on one machine listens on
the loopback interface, and Ray's token is readable for its owner only.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from fmray.runtime import ray_private
from fmray.runtime.console import say
from fmray.runtime.placement import Finding

LOOPBACK = "127.0.0.1"
INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
#: Ray's own switch for loopback only, and the interface through which the ranks of a job talk.
LOOPBACK_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "NCCL_SOCKET_IFNAME": INTERFACE,
}
SESSION = re.compile(r"/session_\d{4}-\d\d-\d\d_")  # in the command line of each of Ray's servers
ROLES = ("gcs_server", "raylet", "dashboard", "agent", "monitor")


@contextmanager
def loopback_only() -> Iterator[None]:
    """Let Ray, here and in the processes that it starts, use 127.0.0.1 as this machine's address.

    Ray replaces a loopback address by the machine's own, except on systems where it supports no
    clusters of several machines. This is that exception.
    """
    constants = ray_private.ray_constants
    enabled, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    before = {name: os.environ.get(name) for name in LOOPBACK_VARIABLES}
    os.environ.update(LOOPBACK_VARIABLES)
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def bind_replica() -> None:
    """Let the Serve replica in this process accept other deployments' calls on its node's address.

    Ray binds that port to all addresses, after the deployment's constructor, which calls this.
    """
    from ray.util import get_node_ip_address

    module, host = ray_private.serve_replica, get_node_ip_address()
    add_port = module.add_port_to_grpc_server
    host = f"[{host}]" if ":" in host else host
    module.add_port_to_grpc_server = lambda server, _: add_port(server, f"{host}:0")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


# --- The token ---


def auth_mode() -> str:
    """Return Ray's RAY_AUTH_MODE, "" if it is not set."""
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def token_file() -> Path | None:
    """Return the file that Ray reads its token from; None if the environment holds the token."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(path) if path else Path.home() / ".ray" / "auth_token"


def protect_token(create: bool) -> None:
    """Make Ray's token readable for its owner only; warn if that is not possible.

    Args:
        create: a cluster starts here. Ray itself would write a missing token readable for all.
    """
    file = token_file()
    if file is None or auth_mode() == "disabled":
        return
    if not file.exists():
        if create and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            file.parent.mkdir(mode=0o700, exist_ok=True)
            with suppress(FileExistsError):
                handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(handle, "w") as output:
                    output.write(secrets.token_hex(32))
        return
    if file.stat().st_mode & 0o077:
        try:
            file.chmod(0o600)
            say(f"{file}: other users could read Ray's token; now only its owner can")
        except OSError as error:  # a mounted secret
            say(
                f"warning: {file}: other users can read Ray's token and so run code here"
                f" ({error.strerror}); make it readable for its owner only"
            )


def warn_without_token(address: str) -> None:
    """Warn of a joined cluster without token at an address that other machines reach."""
    if auth_mode() != "token" and not is_loopback(address.rpartition(":")[0]):
        say(
            f"warning: Ray at {address} is reachable from other machines and asks for no token:"
            " anyone there can run code; start it with RAY_AUTH_MODE=token"
        )


# --- Listening addresses ---


def listening() -> list[Finding]:
    """List the addresses on which Ray's and fmray's processes on this machine listen."""
    processes = _processes()
    names = {process.pid: _name(process) for process in processes}
    ports: dict[tuple[str, str], list[int]] = {}
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:  # macOS asks for root
        return [Finding("note", "listening addresses: the system shows them to root only")]
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.pid in names:
            # IPv4 on a socket that takes both
            address = connection.laddr.ip.removeprefix("::ffff:")
            key = (address, names[connection.pid])
            ports.setdefault(key, []).append(connection.laddr.port)
    return judge(ports, _addresses(), any(map(_asks_no_token, processes)))


def judge(
    ports: dict[tuple[str, str], list[int]], own: Iterable[str], no_token: bool
) -> list[Finding]:
    """Return a finding for each (address, process) of `ports`; those reachable from outside last.

    Args:
        own: the machine's addresses that others reach.
        no_token: Ray asks for none.
    """
    findings = []
    for (address, name), numbers in sorted(ports.items(), key=lambda item: item[0]):
        text = f"{name} listens on {address}, port {', '.join(map(str, sorted(set(numbers))))}"
        if is_loopback(address):
            findings.append(Finding("ok", f"{text}: this machine only"))
            continue
        any_address = ipaddress.ip_address(address).is_unspecified
        where = ", ".join(own) if any_address else address
        if any_address and not where:
            findings.append(Finding("ok", f"{text}: this machine has no other address"))
            continue
        public = any(ipaddress.ip_address(a).is_global for a in (own if any_address else [address]))
        where = f"{text}: reachable from outside at {where}"
        if no_token:
            findings.append(
                Finding("FAIL", f"{where}, and Ray asks for no token; set RAY_AUTH_MODE=token")
            )
        else:
            hint = "; a public address: close it by a firewall" if public else ""
            findings.append(Finding("note", f"{where}{hint}"))
    return sorted(findings, key=lambda finding: finding.level != "ok")


def _processes() -> list[psutil.Process]:
    """Return Ray's servers and workers on this machine, their drivers, and fmray's processes."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if any(map(SESSION.search, words)):
                found |= {child.pid: child for child in process.children(recursive=True)}
                parent = process.parent()
                if parent is not None and "python" in parent.name():  # the driver that started it
                    found[parent.pid] = parent
            elif not any(Path(word).name == "fmray" for word in words[:2]):
                continue
            found[process.pid] = process
    found.pop(os.getpid(), None)
    return list(found.values())


def _asks_no_token(process: psutil.Process) -> bool:
    """Return whether this is the head of a cluster that was started without RAY_AUTH_MODE=token."""
    with suppress(psutil.Error):
        if "gcs_server" in process.name():
            return process.environ().get("RAY_AUTH_MODE", "").lower() != "token"
    return False


def _name(process: psutil.Process) -> str:
    """Return what a process is: one of Ray's servers, a worker, or the start of its command."""
    with suppress(psutil.Error):
        words = process.cmdline()
        if not words:
            return process.name()
        if words[0].startswith("ray::"):
            return words[0].split()[0]
        if any(map(SESSION.search, words)):
            command = " ".join(words[:3])
            return next((f"Ray's {role}" for role in ROLES if role in command), "Ray")
        return " ".join(Path(word).name for word in words[:3])
    return "a process that has ended"


def _addresses() -> list[str]:
    """Return the addresses of this machine that others can reach."""
    return sorted(
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
        and not ipaddress.ip_address(entry.address.partition("%")[0]).is_loopback
        and not ipaddress.ip_address(entry.address.partition("%")[0]).is_link_local
    )
