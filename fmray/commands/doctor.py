"""`fmray doctor`: check the installation, the cluster, and whether a recipe's job fits.

It prints one line per finding (`ok`, `note` or `FAIL`) and exits with 2 if one is a failure. It
takes a recipe of any kind, or none. It starts no cluster: without a running one it checks the
machine that it runs on.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from fmray.adallava.store import is_adaptive
from fmray.config import (
    KINDS,
    AdaLlavaRecipe,
    BaseRecipe,
    ClusterConfig,
    ConfigError,
    FewshotRecipe,
    LoadedRecipe,
    PlansRecipe,
    SearchRecipe,
    load,
)
from fmray.config.arguments import add_overrides
from fmray.config.yaml_file import dump_value
from fmray.data.base_model import check_base, local_folder
from fmray.data.loader import evaluation_samples
from fmray.data.processor import load_processor
from fmray.data.store import StoreSplit
from fmray.fewshot import create_encoder
from fmray.fewshot.encoders import check_files
from fmray.runtime.cluster import NoClusterError, check_answers, connect
from fmray.runtime.exposure import listening
from fmray.runtime.files import check_weights
from fmray.runtime.gpu_memory import (
    CPU_RESERVE,
    GIB,
    GPU_RESERVE,
    Sizes,
    estimate,
    estimate_evaluation,
    saved_bytes,
)
from fmray.runtime.nodes import check_nodes
from fmray.runtime.placement import (
    Finding,
    Machine,
    concurrency,
    machines_of_cluster,
    preflight,
)
from fmray.train.adallava.model import sizes_of
from fmray.train.mirror import open_mirror

JOIN_SECONDS = 60  # to ask a cluster for its machines, including the start of a process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fmray doctor`."""
    parser.add_argument("--config", type=Path, help="recipe (YAML) of the job to check")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 2 if one is a failure, else 0."""
    if arguments.overrides and not arguments.config:
        raise ConfigError("doctor: --set changes a recipe; name one with --config")
    loaded = None
    if arguments.config:
        loaded = load(arguments.config, arguments.overrides, tuple(KINDS.values()))
    failed = False
    for finding in _findings(loaded):
        print(finding, flush=True)
        failed |= finding.level == "FAIL"
    return 2 if failed else 0


def _findings(loaded: LoadedRecipe[BaseRecipe] | None) -> Iterator[Finding]:
    yield from _installed()
    cluster = _cluster(loaded.recipe.cluster.address if loaded else None)
    machines = cluster or [_this_machine()]
    yield from _resources(machines, connected=cluster is not None)
    yield from listening()
    if loaded is not None:
        yield from CHECKS[loaded.recipe.kind](loaded, machines)


# --- Installation and cluster ---------------------------------------------------------------------


def _installed() -> Iterator[Finding]:
    """Compare installed versions with the ranges in fmray's metadata."""
    try:
        requirements = [Requirement(text) for text in requires("fmray") or []]
    except PackageNotFoundError:
        yield Finding(
            "FAIL",
            "fmray is not installed in this environment; run `pip install -e .` in its folder",
        )
        return
    versions = []
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield Finding("FAIL", f"{requirement.name} is not installed; fmray needs {requirement}")
            continue
        versions.append(f"{requirement.name} {installed}")
        # Local builds such as 2.9.0+cpu and pre-releases count as their version.
        if not requirement.specifier.contains(installed, prereleases=True):
            yield Finding(
                "FAIL", f"{requirement.name} {installed}: fmray needs {requirement.specifier}"
            )
    yield Finding("ok", f"Python {platform.python_version()}, {', '.join(versions)}")
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding(
            "FAIL",
            f"torchvision does not import ({next(iter(str(error).splitlines()), '')}): it was built"
            " for another torch; install both together",
        )


def _cluster(address: str | None) -> list[Machine] | None:
    """Return the machines of the running cluster; None if there is none.

    Args:
        address: of the cluster; None for RAY_ADDRESS, or a cluster on this machine.

    A child process asks, so that it can be killed: Ray retries forever to join a cluster that it
    finds but cannot reach.
    """
    import ray

    if ray.is_initialized():
        return machines_of_cluster()
    if address == "local":  # a job always starts a new one
        return None
    check_answers(address)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_machines, args=(address or "auto", sender), daemon=True)
    child.start()
    sender.close()  # with only the child's end open, its death is an EOFError here
    try:
        if not receiver.poll(JOIN_SECONDS):
            raise ValueError(
                f"the Ray cluster at {address or os.environ.get('RAY_ADDRESS') or 'this machine'} "
                f"could not be joined within {JOIN_SECONDS} s; stop its remains with `ray stop`, "
                "or set RAY_ADDRESS to another one"
            )
        answer = receiver.recv()
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer
    except EOFError as error:
        raise ValueError("Ray failed to join the cluster; the reason is above") from error
    finally:
        child.kill()
        child.join()


def _send_machines(address: str, sender: Connection) -> None:
    try:
        with ExitStack() as stack:
            connect(address, log_to_driver=False, stack=stack, existing=True)
            sender.send(machines_of_cluster())
    except NoClusterError:
        sender.send(None)
    except ValueError as error:
        sender.send(str(error))


def _this_machine() -> Machine:
    return Machine("this machine", float(os.cpu_count() or 1), float(torch.cuda.device_count()))


def _resources(machines: list[Machine], connected: bool) -> Iterator[Finding]:
    if connected:
        yield Finding("ok", "a Ray cluster is running")
    else:
        yield Finding("note", "no Ray cluster is running; a job would start one on this machine")
    for machine in machines:
        yield Finding("ok", f"{machine.name}: {machine.cpus:g} CPUs, {machine.gpus:g} GPUs")


# --- One check per kind of recipe -----------------------------------------------------------------


def _adallava(loaded: LoadedRecipe[AdaLlavaRecipe], machines: list[Machine]) -> Iterator[Finding]:
    recipe, several = loaded.recipe, len(machines) > 1
    yield from preflight(recipe, machines)
    yield from _folders(recipe, {"data.store": recipe.data.store}, several)
    yield from _adallava_inputs(recipe, several)


def _fewshot(loaded: LoadedRecipe[FewshotRecipe], machines: list[Machine]) -> Iterator[Finding]:
    recipe, several = loaded.recipe, len(machines) > 1
    yield from preflight(recipe, machines)
    yield from _folders(recipe, {"images.store": recipe.images.store}, several)
    yield from _fewshot_inputs(recipe, several)


def _search(loaded: LoadedRecipe[SearchRecipe], machines: list[Machine]) -> Iterator[Finding]:
    """Check the search itself, then the inputs of its base recipe."""
    from fmray.search.run import base_path
    from fmray.search.trial import load_base

    recipe, several = loaded.recipe, len(machines) > 1
    path = base_path(loaded)
    trials = recipe.cluster.storage / "trials"
    try:
        base = load_base(path, recipe.base_set, trials, recipe.tracking, recipe.evaluations).recipe
    except ValueError as error:
        yield Finding("FAIL", f"base: {error}")
        return
    yield Finding("ok", f"base: {path} is a recipe of kind {base.kind} that trials can run")
    yield from _space(recipe, base)
    try:
        _, text = concurrency(base.cluster, machines)
        yield Finding("ok", text)
    except ValueError as error:
        yield Finding("FAIL", str(error))
    fewshot = isinstance(base, FewshotRecipe)
    stores = {"images.store": base.images.store} if fewshot else {"data.store": base.data.store}
    yield from _folders(recipe, stores, several)
    inputs = _fewshot_inputs if fewshot else _adallava_inputs
    for finding in inputs(base, several):
        yield replace(finding, text=f"base: {finding.text}")


def _plans(loaded: LoadedRecipe[PlansRecipe], machines: list[Machine]) -> Iterator[Finding]:
    """Check the model and its data; a search for plans runs in one process, without a cluster."""
    recipe = loaded.recipe
    yield Finding("ok", "a search for plans runs in one process; there is nothing to place")
    yield from _folders(recipe, {}, several_nodes=False)
    if is_adaptive(recipe.model):
        try:
            check_weights(recipe.model)
            yield Finding("ok", f"model: {recipe.model} is an adaptive model")
        except ValueError as error:
            yield Finding("FAIL", f"model: {error}")
    elif recipe.model.is_dir():
        yield Finding(
            "FAIL", f"model: {recipe.model} is no adaptive model (it has no adaptive.json)"
        )
    else:
        yield Finding("FAIL", f"model: {recipe.model} is missing")
    if _is_prepared(recipe.store):
        yield Finding("ok", f"store: {recipe.store} contains prepared data")
    else:
        yield Finding("FAIL", f"store: {recipe.store} is empty; run jobs/prepare_data.py first")
    yield Finding("note", "the memory of a search for plans is not estimated")


CHECKS: dict[str, Callable[[LoadedRecipe[Any], list[Machine]], Iterator[Finding]]] = {
    "adallava": _adallava,
    "fewshot": _fewshot,
    "search": _search,
    "plans": _plans,
}


# --- Folders and data -----------------------------------------------------------------------------


def _folders(recipe: BaseRecipe, stores: dict[str, Path], several_nodes: bool) -> Iterator[Finding]:
    """Check that storage, mirror and data stores are writable, and shared by all nodes."""
    mirror, storage = recipe.cluster.mirror, recipe.cluster.storage
    if mirror is not None:
        try:
            open_mirror(recipe.cluster, storage / recipe.name)
            yield Finding("ok", f"cluster.mirror: {mirror} is readable")
        except ValueError as error:
            yield Finding("FAIL", str(error))
    folders = {"cluster.storage": (storage, several_nodes and mirror is None)}
    folders |= {key: (path, several_nodes) for key, path in stores.items()}
    common: dict[str, Path] = {}
    for key, (path, shared) in folders.items():
        if shared and not path.is_absolute():
            yield Finding(
                "FAIL",
                f"{key}: {path} is relative, so every node has its own; name a shared folder",
            )
            continue
        folder = _nearest_folder(path)
        if not os.access(folder, os.W_OK):
            yield Finding("FAIL", f"{key}: {path} is not writable ({folder} is read-only)")
            continue
        free = shutil.disk_usage(folder).free / GIB
        yield Finding("ok", f"{key}: {path} is writable, {free:.0f} GiB free")
        if shared:
            common[key] = folder
    if several_nodes:
        yield from check_nodes(common)


def _nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest existing folder above it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _is_prepared(store: Path) -> bool:
    return (store / "manifest.json").is_file()


def _adallava_inputs(recipe: AdaLlavaRecipe, several_nodes: bool) -> Iterator[Finding]:
    """Check data, attention and memory."""
    data = recipe.data
    sources = {
        "data.train": data.train,
        "data.validation": data.validation,
        "data.image_folder": data.image_folder,
    }
    if data.train is None and data.shapes is None and not _is_prepared(data.store):
        yield Finding(
            "FAIL", f"data.store: {data.store} is empty; set data.train or data.shapes: {{}}"
        )
    else:
        yield from _data("data.store", data.store, sources)
    if _is_prepared(data.store):
        yield _samples(recipe)
    if recipe.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        yield Finding(
            "FAIL",
            "model.attention: flash_attention_2 needs the package flash-attn (or use sdpa)",
        )
    yield from _base_model(recipe)
    yield from _adallava_memory(recipe, several_nodes)


def _base_model(recipe: AdaLlavaRecipe) -> Iterator[Finding]:
    """Check that the parts of the base model agree, and that it fits a prepared store."""
    source, revision = recipe.model.source, recipe.model.revision
    if source == "scratch":
        return
    if local_folder(source, revision) is None:
        yield Finding("note", f"model.source: {source} is not on this machine; not checked")
        return
    try:
        store = recipe.data.store
        processor = load_processor(store / "processor") if _is_prepared(store) else None
        check_base(source, revision, processor)
    except ValueError as error:
        yield Finding("FAIL", f"model.source: {error}")
    else:
        yield Finding("ok", f"model.source: config, processor and weights of {source} agree")


def _fewshot_inputs(recipe: FewshotRecipe, several_nodes: bool) -> Iterator[Finding]:
    """Check images, encoder and memory."""
    images, checkpoint = recipe.images, recipe.encoder.checkpoint
    sources = {f"images.collections.{name}": c.path for name, c in images.collections.items()}
    if not sources and not _is_prepared(images.store):
        yield Finding("FAIL", f"images.store: {images.store} is empty; set images.collections")
    else:
        yield from _data("images.store", images.store, sources)
    if checkpoint is not None and not checkpoint.exists():
        yield Finding("FAIL", f"encoder.checkpoint: {checkpoint} is missing")
    else:
        try:
            check_files(recipe.encoder.name, checkpoint)
        except ValueError as error:
            yield Finding("FAIL", f"encoder: {error}")
    yield from _fewshot_memory(recipe, several_nodes)


def _data(key: str, store: Path, sources: dict[str, Path | None]) -> Iterator[Finding]:
    """Check that a store is prepared, or else that the sources for it exist."""
    if _is_prepared(store):
        yield Finding("ok", f"{key}: {store} contains prepared data")
        return
    missing = {name: path for name, path in sources.items() if path and not path.exists()}
    for name, path in missing.items():
        yield Finding("FAIL", f"{name}: {path} is missing")
    if not missing:
        yield Finding("note", f"{key}: {store} is empty; run jobs/prepare_data.py first")


def _samples(recipe: AdaLlavaRecipe) -> Finding:
    """Count the samples of a prepared store as training and evaluation do."""
    data = recipe.data
    try:
        train, held_out = (StoreSplit(data.store, split) for split in ("train", "validation"))
        training = train.samples(data.samples, data.max_length)
        evaluation = evaluation_samples(held_out, recipe.train.eval_rows, data.max_length)
    except (ValueError, OSError) as error:
        return Finding("FAIL", f"data.store: {error}")
    return Finding("ok", f"training on {training}; evaluation on {evaluation}")


class _NeedsTasks(Exception):
    """The space varies tasks, and they are embedded only when the search starts."""


def _space(recipe: SearchRecipe, base: BaseRecipe) -> Iterator[Finding]:
    """Check the search space, its options and the objectives against the base recipe."""
    from fmray.search.space import load_space
    from fmray.search.trial import metrics_of

    def no_tasks() -> Any:
        raise _NeedsTasks

    try:
        space = load_space(recipe.space, base, recipe.options, no_tasks)
        yield Finding("ok", f"space: {recipe.space} varies {', '.join(space.names)}")
    except _NeedsTasks:
        yield Finding("note", f"space: {recipe.space} varies tasks; the search checks it at start")
    except ValueError as error:
        yield Finding("FAIL", str(error))
    metrics = metrics_of(base)
    for i, objective in enumerate(recipe.objectives):
        if objective.metric not in metrics:
            yield Finding(
                "FAIL",
                f"objectives.{i}.metric: trials report no {objective.metric!r}; they report"
                f" {', '.join(metrics)}",
            )


# --- Memory ---------------------------------------------------------------------------------------


def _adallava_memory(recipe: AdaLlavaRecipe, several_nodes: bool) -> Iterator[Finding]:
    """Check that states and activations fit the GPU (or host), and checkpoints the disk."""
    try:
        sizes = sizes_of(recipe)
    except ValueError as error:
        yield Finding("note", f"{error}; the memory is not estimated")
        return
    cluster = recipe.cluster
    memory = estimate(sizes, recipe)
    yield Finding(
        "ok",
        f"{recipe.model.source}: {sizes.parameters:,} parameters, {sizes.trainable:,} train",
    )
    yield _fits(
        memory.total,
        str(memory),
        cluster,
        several_nodes,
        lambda limit: _remedy(sizes, recipe, limit),
    )
    yield _evaluation_memory(sizes, recipe)
    if memory.host:
        yield Finding("note", f"offloading takes {memory.host / GIB:.3g} GiB of the nodes' memory")
    # A new checkpoint is written before the oldest one is deleted.
    checkpoint, count = _checkpoint_bytes(sizes, recipe), recipe.train.keep_checkpoints + 1
    free = shutil.disk_usage(_nearest_folder(cluster.storage)).free
    fits = count * checkpoint < free
    yield Finding(
        "ok" if fits else "FAIL",
        f"checkpoints: {count} of {checkpoint / GIB:.3g} GiB, {free / GIB:.0f} GiB free"
        " in cluster.storage" + ("" if fits else "; lower train.keep_checkpoints"),
    )


def _evaluation_memory(sizes: Sizes, recipe: AdaLlavaRecipe) -> Finding:
    """Compare the memory of `jobs/evaluate.py` with that of its GPU or of the host."""
    source, batch = Path(recipe.model.source), recipe.evaluate.batch
    models = 2 if recipe.adaptive and source.is_dir() and not is_adaptive(source) else 1
    memory = estimate_evaluation(sizes, recipe, models, batch)
    text = f"memory of jobs/evaluate.py: {memory}"
    limit = _gpu_memory(recipe.cluster) if recipe.cluster.gpus_per_worker else _host_memory()
    if limit is None or memory.total <= limit:
        return Finding("ok", text)
    smaller = (batch >> shift for shift in range(1, batch.bit_length()))
    fitting = (n for n in smaller if estimate_evaluation(sizes, recipe, models, n).total <= limit)
    best = next(fitting, None)
    hint = "a shorter data.max_length uses less" if best is None else f"evaluate.batch: {best} fits"
    return Finding("note", f"{text} of {limit / GIB:.3g}; {hint}")


def _fewshot_memory(recipe: FewshotRecipe, several_nodes: bool) -> Iterator[Finding]:
    """Check that the encoder's states and the activations of one episode fit."""
    if recipe.train.method in ("maml", "direct"):
        yield Finding("note", f"the memory of train.method: {recipe.train.method} is not estimated")
        return
    episode = recipe.episodes
    count = episode.ways * (episode.shots + episode.queries)
    try:
        encoder = create_encoder(recipe.encoder.name, None, False, recipe.encoder.image_size)
        size = encoder.preprocess.size
        parameters = sum(p.numel() for p in encoder.parameters())
        images = torch.empty(count, 3, size, size, device="meta")
        activations = saved_bytes(encoder.to("meta").train(), images)
    except (ValueError, RuntimeError) as error:  # no config here; an operation without shapes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        yield Finding("note", f"encoder.name: {reason}; the memory is not estimated")
        return
    yield Finding("ok", f"{recipe.encoder.name}: {parameters:,} parameters, all train")
    # Weights and gradients in float32; SGD keeps one moment, AdamW two.
    states = 4 * parameters * (3 if recipe.train.optimizer == "sgd" else 4)
    reserve = GPU_RESERVE if recipe.cluster.gpus_per_worker else CPU_RESERVE
    total = states + activations + reserve
    text = (
        f"{total / GIB:.3g} GiB (states {states / GIB:.3g}, activations of {count} images"
        f" {activations / GIB:.3g}, reserve {reserve / GIB:.3g})"
    )
    yield _fits(
        total,
        text,
        recipe.cluster,
        several_nodes,
        lambda _: "; lower episodes.ways, episodes.queries or encoder.image_size",
    )


def _fits(
    needed: float,
    text: str,
    cluster: ClusterConfig,
    several_nodes: bool,
    remedy: Callable[[float], str],
) -> Finding:
    """Compare the bytes that a worker needs with those of its GPU or its share of the host.

    Args:
        remedy: of the bytes available, the hint of a failure.
    """
    if cluster.gpus_per_worker:
        place, limit = "GPU", _gpu_memory(cluster)
    else:
        # Without GPUs the workers of a machine share its memory.
        place, limit = "worker", _host_memory() / cluster.world_sizes[-1]
    if limit is None:
        hint = "; set cluster.gpu_memory_gib to compare"
        return Finding("note", f"memory per {place}: {text}{hint}")
    if not cluster.gpus_per_worker and several_nodes:
        return Finding("note", f"memory per {place}: {text}")
    fits = needed <= limit
    hint = "" if fits else remedy(limit)
    return Finding(
        "ok" if fits else "FAIL", f"memory per {place}: {text} of {limit / GIB:.3g}{hint}"
    )


def _remedy(sizes: Sizes, recipe: AdaLlavaRecipe, limit: float) -> str:
    """Return the first usual remedy that makes the job fit, ordered by its cost in speed."""
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
        if valid and estimate(sizes, changed_recipe).total <= limit:
            return f"; {key}: {dump_value(value)} would fit"
    return "; more workers, a shorter data.max_length or model.lora: {} use less"


def _gpu_memory(cluster: ClusterConfig) -> float | None:
    if cluster.gpu_memory_gib:
        return cluster.gpu_memory_gib * GIB
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _checkpoint_bytes(sizes: Sizes, recipe: AdaLlavaRecipe) -> int:
    """Return the size of weights, and per trainable parameter a float32 copy and two moments."""
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    return width * sizes.parameters + 12 * sizes.trainable
