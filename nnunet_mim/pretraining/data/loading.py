"""Batches of crops, read ahead by worker processes."""

from __future__ import annotations

from collections.abc import Generator
from math import prod

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.pretraining.data.crops import CropDataset
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.distributed.ranks import Ranks
from nnunet_mim.pretraining.options import RunOptions
from nnunet_mim.system.machine import physical_memory
from nnunet_mim.system.processes import leave_stopping_to_parent

MAX_AHEAD = 4
"""batches that a worker holds ready"""
SHARE_AHEAD = 0.25
"""of the machine's memory that batches held ready may take"""


def _batches_ahead(workers: int, batch_bytes: int, processes: int, memory: int) -> int:
    """Batches that each worker holds ready, where so many processes train on this machine, each with so many workers;
    memory in bytes, 0: unknown.
    """
    if not memory:
        return MAX_AHEAD
    fitting = int(SHARE_AHEAD * memory / (max(1, workers) * processes * batch_bytes))
    return max(1, min(MAX_AHEAD, fitting))


def _collate_half(items: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """A batch whose crops are float16."""
    crops, *others = default_collate(items)
    return crops.half(), *others


def training_crops(data: RunData, config: PretrainConfig) -> CropDataset:
    """All crops of the run, by number: those of iteration i are i * batch_size and the following."""
    return CropDataset(
        data.train, levels_of(config)[0].fov, config.body_fraction, config.mirror_axes, seed=config.seed, stream=0,
        temperature=config.dataset_temperature,
    )  # fmt: skip


def training_batches(
    dataset: CropDataset, config: PretrainConfig, start: int, options: RunOptions, device: torch.device, ranks: Ranks
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """This rank's part of the batches of iterations `start` to the last: crops (B, C, …) float32 and valid boxes
    (B, 3, 2) on the device, and cases that could not be read (B, TRIES), see CropDataset.

    For a step in bf16 on a GPU crops travel as float16, half of the bytes: at 1000 HU that is 1 HU.
    """
    workers = options.workers or 0
    half = device.type == "cuda" and options.precision == "bf16-mixed"
    n = config.batch_size // ranks.world
    firsts = (i * config.batch_size + ranks.rank * n for i in range(start, config.iterations))
    here = min(ranks.world, torch.cuda.device_count()) if device.type == "cuda" else ranks.world
    batch_bytes = 4 * n * config.in_channels * prod(int(size) for size in dataset.crop_size)
    loader = DataLoader(
        dataset,
        batch_sampler=(list(range(first, first + n)) for first in firsts),  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=_batches_ahead(workers, batch_bytes, here, physical_memory()) if workers else None,
        collate_fn=_collate_half if half else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_stopping_to_parent,
    )
    try:
        for crops, valid, missed in loader:
            yield crops.to(device, non_blocking=True).float(), valid.to(device, non_blocking=True), missed
    except MiMError as error:  # a worker's comes with its traceback before the one line
        raise MiMError(str(error).strip().splitlines()[-1].split("MiMError: ")[-1]) from None
