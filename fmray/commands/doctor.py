"""`fmray doctor`: what is installed, what Ray sees, and whether a recipe's job can be placed and
will fit.

In: a recipe, or none. Out: plain lines on stdout, each `ok`, `note` or `FAIL`, and an exit code: 2
when something failed. It starts no cluster: without a running one it judges the machine it is on.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from packaging.requirements import Requirement

from fmray.config import AdaLlavaRecipe, ConfigError, load
from fmray.config.arguments import add_overrides
from fmray.config.yaml_file import dump_value
from fmray.runtime.cluster import check_answers
from fmray.runtime.gpu_memory import GIB, Sizes, estimate
from fmray.runtime.nodes import check_nodes
from fmray.runtime.placement import Finding, Machine, machines_of_cluster, preflight
from fmray.train.adallava.model import sizes_of
from fmray.train.mirror import open_mirror

JOIN_SECONDS = 60  # to ask a cluster what it has, the start of a process included


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fmray doctor`."""
    parser.add_argument("--config", type=Path, help="recipe (YAML) whose job is judged")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """`fmray doctor`: print the findings; 2 if one is a failure."""
    if arguments.overrides and not arguments.config:
        raise ConfigError("doctor: --set changes a recipe; name one with --config")
    recipe = load(arguments.config, arguments.overrides).recipe if arguments.config else None
    return doctor(recipe)


def doctor(recipe: AdaLlavaRecipe | None) -> int:
    """Print what is there and, with a recipe, whether its job can run; returns 0 or 2."""
    failed = False
    for finding in _findings(recipe):
        print(finding, flush=True)
        failed |= finding.level == "FAIL"
    return 2 if failed else 0


def _findings(recipe: AdaLlavaRecipe | None) -> Iterator[Finding]:
    yield from _installed()
    cluster = _cluster(recipe.cluster.address if recipe else None)
    machines = cluster or [_this_machine()]
    yield from _seen(machines, connected=cluster is not None)
    if recipe is None:
        return
    yield from preflight(recipe, machines)
    yield from _folders(recipe, several_nodes=len(machines) > 1)
    yield from _data(recipe)
    yield from _attention(recipe)
    yield from _memory(recipe, several_nodes=len(machines) > 1)


def _installed() -> Iterator[Finding]:
    """Versions against the ranges that fmray's own metadata asks for."""
    try:
        wanted = [Requirement(text) for text in requires("fmray") or []]
    except PackageNotFoundError:
        yield Finding(
            "FAIL",
            "fmray is not installed in this environment; run `pip install -e .` in its folder",
        )
        return
    found = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            present = version(requirement.name)
        except PackageNotFoundError:
            yield Finding("FAIL", f"{requirement.name} is not installed; fmray needs {requirement}")
            continue
        found.append(f"{requirement.name} {present}")
        # Builds such as 2.9.0+cpu count as their version, and so do pre-releases.
        if not requirement.specifier.contains(present, prereleases=True):
            yield Finding(
                "FAIL", f"{requirement.name} {present}: fmray needs {requirement.specifier}"
            )
    yield Finding("ok", f"Python {platform.python_version()}, {', '.join(found)}")
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding(
            "FAIL",
            f"torchvision does not import ({next(iter(str(error).splitlines()), '')}): it was made"
            " for another build of torch; install both together",
        )


def _cluster(address: str | None) -> list[Machine] | None:
    """The machines of the cluster at `address`, RAY_ADDRESS or this machine's; None: none runs.

    Asked from a process that can be ended: Ray goes on trying to join a cluster that it sees and
    cannot reach.
    """
    import ray

    if ray.is_initialized():
        return machines_of_cluster()
    if address == "local":  # always a new one
        return None
    check_answers(address)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_machines, args=(address or "auto", sender), daemon=True)
    child.start()
    sender.close()  # the child's end alone stays open, so that its death is seen
    try:
        if not receiver.poll(JOIN_SECONDS):
            raise ValueError(
                f"the Ray cluster at {address or os.environ.get('RAY_ADDRESS') or 'this machine'} "
                f"could not be joined within {JOIN_SECONDS} s; end what is left of it with "
                "`ray stop`, or set RAY_ADDRESS to another"
            )
        found = receiver.recv()
    except EOFError as error:
        raise ValueError("Ray failed while it joined the cluster; its reason is above") from error
    finally:
        child.kill()
        child.join()
    return found


def _send_machines(address: str, sender: Connection) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError:  # "auto" found none on this machine
        sender.send(None)
    else:
        sender.send(machines_of_cluster())


def _this_machine() -> Machine:
    return Machine("this machine", float(os.cpu_count() or 1), float(torch.cuda.device_count()))


def _seen(machines: list[Machine], connected: bool) -> Iterator[Finding]:
    if connected:
        yield Finding("ok", "a Ray cluster is running")
    else:
        yield Finding("note", "no Ray cluster is running; a job would start one on this machine")
    for machine in machines:
        yield Finding("ok", f"{machine.name}: {machine.cpus:g} CPUs, {machine.gpus:g} GPUs")


def _folders(recipe: AdaLlavaRecipe, several_nodes: bool) -> Iterator[Finding]:
    mirror, storage = recipe.cluster.mirror, recipe.cluster.storage
    if mirror is not None:
        try:
            open_mirror(recipe.cluster, storage / recipe.name)
            yield Finding("ok", f"cluster.mirror: {mirror} can be read")
        except ValueError as error:
            yield Finding("FAIL", str(error))
    common: dict[str, Path] = {}
    for key, path, shared in (
        ("cluster.storage", storage, several_nodes and mirror is None),
        ("data.store", recipe.data.store, several_nodes),
    ):
        if shared and not path.is_absolute():
            yield Finding(
                "FAIL",
                f"{key}: {path} is relative: every node has its own; name a folder that all share",
            )
            continue
        folder = _nearest_folder(path)
        if not os.access(folder, os.W_OK):
            yield Finding("FAIL", f"{key}: {path} cannot be written ({folder} is read-only for us)")
            continue
        free = shutil.disk_usage(folder).free / GIB
        yield Finding("ok", f"{key}: {path} can be written, {free:.0f} GiB free")
        if shared:
            common[key] = folder
    if several_nodes:
        yield from check_nodes(common)


def _nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above that is there already."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _data(recipe: AdaLlavaRecipe) -> Iterator[Finding]:
    data = recipe.data
    if (data.store / "manifest.json").is_file():
        yield Finding("ok", f"data.store: {data.store} holds prepared data")
        return
    sources = {
        "data.train": data.train,
        "data.validation": data.validation,
        "data.image_folder": data.image_folder,
    }
    missing = [f"{key}: {path}" for key, path in sources.items() if path and not path.exists()]
    for text in missing:
        yield Finding("FAIL", f"{text} is not there")
    if data.train is None and data.shapes is None:
        yield Finding(
            "FAIL", f"data.store: {data.store} is empty; set data.train or data.shapes: {{}}"
        )
    elif not missing:
        yield Finding("note", f"data.store: {data.store} is empty; run jobs/prepare_data.py first")


def _attention(recipe: AdaLlavaRecipe) -> Iterator[Finding]:
    if recipe.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        yield Finding(
            "FAIL",
            "model.attention: flash_attention_2 needs the package flash-attn (or use sdpa)",
        )


def _memory(recipe: AdaLlavaRecipe, several_nodes: bool) -> Iterator[Finding]:
    """Whether the states and activations fit the GPU (the machine), and checkpoints the disk."""
    try:
        sizes = sizes_of(recipe)
    except ValueError as error:
        yield Finding("note", f"{error}; so the memory is not estimated")
        return
    cluster = recipe.cluster
    need = estimate(sizes, recipe)
    yield Finding(
        "ok",
        f"{recipe.model.source}: {sizes.parameters:,} parameters, {sizes.trainable:,} learn",
    )
    if cluster.gpus_per_worker:
        where, have = "GPU", _gpu_memory(recipe)
    else:
        # Without GPUs the workers of a machine share its memory.
        where, have = "worker", _host_memory() / cluster.world_sizes[-1]
    if have is None:
        yield Finding("note", f"memory per {where}: {need}; set cluster.gpu_memory_gib to compare")
    elif not cluster.gpus_per_worker and several_nodes:
        yield Finding("note", f"memory per {where}: {need}")
    else:
        fits = need.total <= have
        text = f"memory per {where}: {need} of {have / GIB:.3g}"
        yield Finding(
            "ok" if fits else "FAIL", text + ("" if fits else _what_would_fit(sizes, recipe, have))
        )
    if need.host:
        yield Finding(
            "note", f"offloading keeps {need.host / GIB:.3g} GiB in the nodes' own memory"
        )
    checkpoint = _checkpoint_bytes(sizes, recipe)
    count = recipe.train.keep_checkpoints + 1  # a new one is written before an old one goes
    free = shutil.disk_usage(_nearest_folder(cluster.storage)).free
    yield Finding(
        "ok" if count * checkpoint < free else "FAIL",
        f"checkpoints: {count} of {checkpoint / GIB:.3g} GiB, {free / GIB:.0f} GiB free"
        " in cluster.storage"
        + ("" if count * checkpoint < free else "; lower train.keep_checkpoints"),
    )


def _what_would_fit(sizes: Sizes, recipe: AdaLlavaRecipe, have: float) -> str:
    """The first of the usual remedies, the cheapest in speed first, with which the job fits."""
    for key, value in (
        ("train.gradient_checkpointing", True),
        ("zero.stage", 3),
        ("train.micro_batch", recipe.train.micro_batch // 2),
        ("train.micro_batch", recipe.train.micro_batch // 4),
        ("train.micro_batch", 1),
        ("zero.offload_optimizer", "cpu"),
    ):
        section, _, name = key.partition(".")
        changed = getattr(recipe, section).model_copy(update={name: value})
        changed_recipe = recipe.model_copy(update={section: changed})
        valid = value and not any(changed_recipe.conflicts())
        if valid and estimate(sizes, changed_recipe).total <= have:
            return f"; {key}: {dump_value(value)} would fit"
    return "; more workers, a shorter data.max_length or model.lora: {} use less"


def _gpu_memory(recipe: AdaLlavaRecipe) -> float | None:
    if recipe.cluster.gpu_memory_gib:
        return recipe.cluster.gpu_memory_gib * GIB
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _checkpoint_bytes(sizes: Sizes, recipe: AdaLlavaRecipe) -> int:
    """Weights, and per learning parameter a float32 copy and Adam's two moments."""
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    return width * sizes.parameters + 12 * sizes.trainable
