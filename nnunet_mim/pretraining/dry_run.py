"""What a run will cost, measured on a few real steps of it."""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
import torch
from lightning_fabric import Fabric

from nnunet_mim.checkpoint.locate import FINAL
from nnunet_mim.geometry import levels_of, views_per_crop
from nnunet_mim.pretraining.data.loading import training_batches, training_crops
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.distributed.ranks import ranks_of
from nnunet_mim.pretraining.loop import pretrain
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.step import PROBE_VIEWS, DeviceMemoryError, full_memory_named
from nnunet_mim.pretraining.step import WARM_UP as RECORDED_AFTER
from nnunet_mim.system.machine import physical_memory

WARM_UP = RECORDED_AFTER + 1
"""steps that are not timed; on a GPU the last of them is recorded"""
SECONDS = 30.0
"""about how long the timed steps take"""
USABLE = 0.9
"""share of a device's memory that a batch may fill"""
GIB = 2**30


@dataclass(frozen=True)
class _Trial:
    """A few steps of a run."""

    step_s: float
    """median seconds of an iteration"""
    measure_s: float
    """seconds of one measurement on one held-out crop"""
    memory: int
    """peak, bytes that were reserved: on the device, or by this process on a CPU"""
    used: int
    """peak, bytes in use: the same on a CPU"""
    weights: int
    """bytes of the final checkpoint"""


def dry_run(run: Run, fabric: Fabric) -> str:
    """Measure a few steps in a temporary folder.

    Args:
        run: that is asked about; its folder need not exist.
        fabric: launched.

    Returns:
        lines with the speed, time, disk and memory of the whole run, the bottleneck, and the largest batch that fits;
        or one that says what to change where the memory of the device does not hold a step.
    """
    config, data, folder = run.config, run.data, run.folder
    run = replace(run, config=replace(config, unet_every=1, decoder_phase=1.0))
    try:
        first = _try(run, fabric, WARM_UP + 1)
    except DeviceMemoryError as error:
        return f"batch        {error}"
    steps = WARM_UP + min(50, max(3, round(SECONDS / max(first.step_s, 1e-3))))
    trial = _try(run, fabric, steps)
    if config.decoder == "unet":  # which learns in some of the iterations
        without = _try(replace(run, config=replace(config, decoder="mim")), fabric, steps).step_s
        share = sum(map(config.unet_learns, range(config.iterations))) / config.iterations
        trial = replace(trial, step_s=share * trial.step_s + (1 - share) * without)
    data_s = _seconds_of_data(run, fabric, steps)
    batch = _what_fits(run, trial, fabric)

    crops_per_s, data_rate = config.batch_size / trial.step_s, config.batch_size / data_s
    measurements = config.iterations // config.val_every + 1
    measuring = measurements * max(config.val_crops, _datasets(data)) * trial.measure_s
    seconds = config.iterations * trial.step_s + measuring
    share = measuring / seconds
    disk = trial.weights * 5  # latest: weights and two moments; best; final
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    bound = "data: add --workers" if trial.step_s < 1.15 * data_s else "compute"
    kind = "GPU memory" if fabric.device.type == "cuda" else "memory of the process"
    return "\n".join(
        [
            f"speed        {crops_per_s:.3g} crops/s ({trial.step_s:.3g} s an iteration, median of {steps - WARM_UP})",
            f"bottleneck   {bound} (reading alone: {data_rate:.3g} crops/s)",
            f"whole run    {_duration(seconds)} for {config.iterations} iterations, {share:.1%} of it measurements",
            f"disk         {disk / GIB:.2f} GiB for three checkpoints and their curves; {free / GIB:.1f} GiB are free",
            f"peak memory  {trial.memory / GIB:.2f} GiB ({kind})",
            f"batch        {batch}",
        ]
    )


def _try(run: Run, fabric: Fabric, steps: int) -> _Trial:
    """Run `steps` iterations of the real loop with one held-out crop."""
    short = replace(
        run.config, iterations=steps, val_every=steps, save_every=steps + 1, val_crops=1, probe_every=0,
        init_checkpoint="",
    )  # fmt: skip
    cuda = fabric.device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()  # what the last trial has left
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []

    def note(_: int) -> None:
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        with full_memory_named(run):
            record = pretrain(replace(run, config=short, folder=Path(folder), stored=None), fabric, note)
        weights = (Path(folder) / FINAL).stat().st_size if fabric.is_global_zero else 0
    durations = [b - a for a, b in pairwise(times)]
    memory, used = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()) if cuda else (_peak_rss(),) * 2
    measure_s = median(record.monitor.seconds["held_out"]) / _datasets(run.data)  # one crop of each
    return _Trial(median(durations[WARM_UP - 1 :]), measure_s, memory, used, weights)


def _datasets(data: RunData) -> int:
    """How many have held-out cases."""
    return int(np.count_nonzero(data.val.counts))


def _seconds_of_data(run: Run, fabric: Fabric, steps: int) -> float:
    """Seconds a batch takes to be read, while nothing else is done."""
    workers = run.options.workers or 0
    many = replace(run.config, iterations=steps + 2 * max(1, workers))
    dataset = training_crops(run.data, many)
    batches = training_batches(dataset, many, 0, run.options, fabric.device, ranks_of(fabric))
    next(batches)
    since, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
    return (time.perf_counter() - since) / max(1, count)


def _what_fits(run: Run, trial: _Trial, fabric: Fabric) -> str:
    """How many crops a step fit, in words. Passes that grow as long as they fit are measured as small ones."""
    batch, note = run.config.batch_size, "memory for activations is bounded by --views_per_pass"
    sized = run.options.views_per_pass is None
    if sized:
        run = replace(run, options=replace(run.options, views_per_pass=PROBE_VIEWS))
        note = f"in passes of {PROBE_VIEWS} views; larger ones where they fit"
    twice = replace(run, config=replace(run.config, batch_size=2 * batch))
    try:
        trial = _try(run, fabric, WARM_UP + 1) if sized else trial
        doubled = _try(twice, fabric, WARM_UP + 1)
        return f"about {_largest_batch(run, trial, doubled, fabric)} crops fit ({note})"
    except DeviceMemoryError:
        return f"{batch} crops fit, {2 * batch} do not ({note})"


def _largest_batch(run: Run, trial: _Trial, doubled: _Trial, fabric: Fabric) -> int:
    """Crops a step that fill the memory of all devices, by the growth from one batch to twice as much.

    Passes grow with the batch until they hold `views_per_pass` views. From then on a crop takes only what is kept of it
    during the whole step, however little work it is.
    """
    config, here = run.config, run.config.batch_size // fabric.world_size
    levels = levels_of(config)
    views = views_per_crop(levels)
    images = sum(n * prod(level.view_size) for n, level in zip(views, levels, strict=True))
    least = 4 * config.in_channels * (images + 2 * prod(levels[0].fov))  # views, and the crop before and after padding
    growth = max((doubled.used - trial.used) / here, least)
    if fabric.device.type == "cuda":
        total = torch.cuda.get_device_properties(fabric.device).total_memory
    else:
        total = physical_memory()
    room = USABLE * total - doubled.memory
    if room < 0:
        return max(config.batch_size, fabric.world_size * int(2 * here + room / growth))
    assert run.options.views_per_pass is not None
    full_pass = -(-run.options.views_per_pass // max(views))  # crops
    growing = min(max(0, full_pass - 2 * here), room / growth)
    kept = growth if here >= full_pass else least
    return fabric.world_size * int(2 * here + growing + (room - growing * growth) / kept)


def _peak_rss() -> int:
    """Largest memory of this process so far, bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172800 else f"{seconds / 86400:.1f} days"
