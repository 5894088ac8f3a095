"""Machines simulated by network namespaces, a Ray cluster on them, and faults.

Needs root. `Machines` is a bridge with machines that have an address, a link and a raylet each; the
first one is the head and runs the jobs. All see the files of this machine, so storage is shared.

The processes of a machine are found by its namespace (`ip netns pids`), so that none is left when
it is removed. Names contain the process id of their creator, so that leftovers of a killed run can
be removed too.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREFIX = "fmray"
PORT = 6379
RAYLET = "/raylet/raylet "
ROOT = Path(__file__).parents[2]
START_SECONDS = 300  # for processes that share two cores with others
OBJECT_STORE_BYTES = 80 * 2**20

# Ray's default timeouts, for slow machines, are 15 to 60 seconds
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "8",
    "RAY_memory_monitor_refresh_ms": "0",  # all machines share one memory
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "GLOO_SOCKET_IFNAME": "eth0",  # their host name is that of this machine
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


@dataclass
class Machine:
    """A network namespace."""

    number: int  # from 1, the head
    address: str
    cpus: int
    owner: int = field(default_factory=os.getpid)  # process that has created it

    @property
    def name(self) -> str:
        """Name of the namespace, and of its link on this machine."""
        return f"{PREFIX}{self.owner}-{self.number}"

    def pids(self) -> dict[int, str]:
        """Return the titles of its processes by id, without zombies."""
        titles = {}
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if title.strip():
                    titles[pid] = title.strip()
        return titles

    def find(self, title: str) -> list[int]:
        """Return the processes whose title contains `title`."""
        return sorted(pid for pid, text in self.pids().items() if title in text)

    def kill_raylet(self) -> None:
        """Kill the raylet, as in a crash of Ray; its workers end by themselves."""
        [raylet] = self.find(RAYLET)
        os.kill(raylet, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill all its processes, jobs included; their connections are closed."""
        while running := self.pids():
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def lose_power(self) -> None:
        """Take the link down and kill all processes; the link stays down until `mend`."""
        self.link(up=False)
        self.kill_all()

    def link(self, up: bool) -> None:
        """Take the network link up or down."""
        _run("ip", "link", "set", self.name, "up" if up else "down")

    def cap(self, megabits: float) -> None:
        """Limit the rate of sending and of receiving, each."""
        limit = ["tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms"]
        _run("tc", "qdisc", "replace", "dev", self.name, "root", *limit)
        inside = ["ip", "netns", "exec", self.name]
        _run(*inside, "tc", "qdisc", "replace", "dev", "eth0", "root", *limit)


@dataclass
class Job:
    """A command on a machine, with its output in a file."""

    process: subprocess.Popen[bytes]
    output: Path

    def text(self) -> str:
        """Return the output so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {seconds:.0f} s: ...{self.text()[-6000:]}"
            ) from None


@dataclass
class Machines:
    """Machines with Ray on them; created by `made`."""

    folder: Path
    machines: list[Machine]
    _observer: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def head(self) -> Machine:
        """The machine of Ray's GCS and the jobs."""
        return self.machines[0]

    @property
    def address(self) -> str:
        """The value of RAY_ADDRESS."""
        return f"{self.head.address}:{PORT}"

    def environment(self) -> dict[str, str]:
        """Return the environment of processes on the machines."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "PYTEST_"))
        }
        return (
            inherited
            | ENVIRONMENT
            | {
                "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
                "RAY_TMPDIR": str(self.folder),
                "RAY_ADDRESS": self.address,
                "PYTHONPATH": str(ROOT),
            }
        )

    def run(self, command: Sequence[str], output: str, on: Machine | None = None) -> Job:
        """Start a command on a machine, the head by default."""
        path = self.folder / f"{output}.log"
        with path.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", (on or self.head).name, *command],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return Job(process, path)

    def start_ray(self, *machines: Machine) -> None:
        """Start a raylet on each machine, and the GCS on the head; return when all have joined."""
        if self.head in machines:
            self._close_observer()  # it is connected to the previous head
            head = self._start(self.head)
            until(lambda: self._listens() or head.process.poll(), START_SECONDS, "Ray's GCS")
        jobs = {
            machine.number: self._start(machine) for machine in machines if machine is not self.head
        }
        if self.head in machines:
            assert head.wait(START_SECONDS) == 0, head.text()
        for machine in machines:
            # retry: Ray's limit is half a minute, which is short if three nodes share two cores
            if machine is not self.head and jobs[machine.number].wait(START_SECONDS) != 0:
                again = self._start(machine)
                assert again.wait(START_SECONDS) == 0, again.text()
        addresses = {machine.address for machine in machines}
        until(
            lambda: addresses <= {node["address"] for node in self.nodes()},
            START_SECONDS,
            "all nodes to join",
        )

    def _start(self, machine: Machine) -> Job:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"),
            *("--node-ip-address", machine.address, "--num-cpus", str(machine.cpus)),
            *("--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--temp-dir", str(self.folder / str(machine.number))),
        ]
        if machine is self.head:
            # with the dashboard, which Ray's cleaner of placement groups queries
            command += ["--head", "--port", str(PORT)]
        else:
            command += ["--address", self.address]
        machine.kill_all()
        return self.run(command, f"start-{machine.number}", machine)

    def cap(self, megabits: float) -> None:
        """Limit every link."""
        for machine in self.machines:
            machine.cap(megabits)

    def mend(self) -> None:
        """Restore all links and raylets after a test."""
        for machine in self.machines:
            machine.link(up=True)
        if not self.head.find("gcs_server "):
            for machine in self.machines:
                machine.kill_all()
            self.start_ray(*self.machines)
            return
        alive = {node["address"] for node in self.nodes() if not node["draining"]}
        broken = [
            machine
            for machine in self.machines
            if machine.address not in alive or not machine.find(RAYLET)
        ]
        for machine in broken:
            machine.kill_all()
        self.start_ray(*broken)

    def drain(self, machine: Machine, seconds: int) -> None:
        """Announce that the machine is preempted in `seconds`, like a spot machine."""
        [node] = [node["id"] for node in self.nodes() if node["address"] == machine.address]
        rejected = self._ask(f"drain {node} {seconds}")
        assert not rejected, rejected

    def _listens(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((self.head.address, PORT), timeout=1).close()
            return True
        return False

    def nodes(self) -> list[dict[str, Any]]:
        """Return id, address and draining of Ray's living nodes."""
        return self._ask("nodes")

    def placement_groups(self) -> list[dict[str, Any]]:
        """Return id and state of the placement groups that hold resources or wait for them."""
        return self._ask("groups")

    def _ask(self, what: str) -> list[dict[str, Any]]:
        if self._observer is None or self._observer.poll() is not None:
            self._observer = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("cluster_state.py"))],
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._observer.stdin is not None and self._observer.stdout is not None
        self._observer.stdin.write(f"{what}\n")
        self._observer.stdin.flush()
        line = self._observer.stdout.readline()
        assert line, f"Ray's GCS at {self.address} does not answer"
        return json.loads(line)

    def _close_observer(self) -> None:
        if self._observer is not None:
            self._observer.kill()
            self._observer.wait()
            self._observer = None

    def close(self) -> None:
        """End all processes on the machines, and remove the machines."""
        self._close_observer()
        _take_down(lambda owner: owner == os.getpid())


@contextlib.contextmanager
def made(folder: Path, cpus: Sequence[int] = (1, 1, 1)) -> Iterator[Machines]:
    """Yield `linked` machines with Ray running on all of them."""
    with linked(folder, cpus) as cluster:
        cluster.start_ray(*cluster.machines)
        yield cluster


@contextlib.contextmanager
def linked(folder: Path, cpus: Sequence[int] = (1, 1, 1)) -> Iterator[Machines]:
    """Yield machines without processes; afterwards remove them with all processes.

    Args:
        folder: with a short path, for Ray's sockets (107 bytes). If its name is `PREFIX`, process
            id, `-...`, file systems below it that a killed run has left are unmounted too.
        cpus: of each machine, for Ray.
    """
    _remove_leftovers()
    network = _free_network()
    hosts = [str(address) for address in network.hosts()]
    bridge = f"{PREFIX}{os.getpid()}"
    machines = [Machine(number, hosts[number], count) for number, count in enumerate(cpus, 1)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token").write_text(os.urandom(32).hex(), encoding="utf-8")
    (folder / "token").chmod(0o600)
    cluster = Machines(folder, machines)
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "address", "add", f"{hosts[0]}/{network.prefixlen}", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for machine in machines:
            inside = ["ip", "-n", machine.name]
            _run("ip", "netns", "add", machine.name)
            peer = ["peer", "name", "eth0", "netns", machine.name]
            _run("ip", "link", "add", machine.name, "type", "veth", *peer)
            _run("ip", "link", "set", machine.name, "master", bridge, "up")
            address = f"{machine.address}/{network.prefixlen}"
            _run(*inside, "address", "add", address, "dev", "eth0")
            _run(*inside, "link", "set", "eth0", "up")
            _run(*inside, "link", "set", "lo", "up")
        yield cluster
    finally:
        cluster.close()


def until(condition: Callable[[], Any], seconds: float, what: str) -> float:
    """Wait until the condition holds; return the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - start


def _remove_leftovers() -> None:
    """Remove the leftovers of killed runs."""

    def gone(owner: int) -> bool:
        return not Path(f"/proc/{owner}").exists()

    _take_down(gone)
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        path = line.split()[1]
        owner = re.search(rf"/{PREFIX}(\d+)-[^/]*/", path)
        if owner and gone(int(owner[1])):
            _run("umount", "--lazy", path)


def _take_down(whose: Callable[[int], bool]) -> None:
    """End the processes in the namespaces of these owners, and remove namespaces and links."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        owner = re.match(rf"{PREFIX}(\d+)-(\d+)\b", line)
        if owner and whose(int(owner[1])):
            machine = Machine(int(owner[2]), "", 0, int(owner[1]))
            machine.kill_all()
            _run("ip", "netns", "del", machine.name)
    for path in Path("/sys/class/net").iterdir():
        owner = re.fullmatch(rf"{PREFIX}(\d+)(-\d+)?", path.name)
        if owner and whose(int(owner[1])):
            # it may already be removed with its namespace
            subprocess.run(["ip", "link", "del", path.name], capture_output=True, check=False)


def _free_network() -> ipaddress.IPv4Network:
    routes = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True)
    first = (line.split()[0] for line in routes.stdout.splitlines())
    taken = [ipaddress.ip_network(word) for word in first if word[0].isdigit()]
    for number in range(77, 256):
        network = ipaddress.IPv4Network(f"10.{number}.0.0/24")
        if not any(network.overlaps(other) for other in taken):
            return network
    raise AssertionError("every 10.x.0.0/24 from 10.77 on is taken")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
