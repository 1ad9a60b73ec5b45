"""Processes and devices of a run, through Lightning Fabric: one device, several of one machine, torchrun, SLURM."""

from __future__ import annotations

import os
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from nnunet_mim.errors import MiMError, printable_lines
from nnunet_mim.system.processes import end_with_parent


def device_count(wanted: int | None) -> tuple[int, int]:
    """Devices of this machine, and machines.

    Args:
        wanted: `-num_gpus`; None: as many as torchrun or SLURM has started processes for, or 1.

    Raises:
        MiMError: another number than torchrun or SLURM has started processes for.
    """
    here, nodes = 1, 1
    started = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes, started = int(os.environ["WORLD_SIZE"]) // here, "torchrun"
    elif "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        here, started = int(os.environ["SLURM_NTASKS"]) // nodes, "SLURM (one task a device)"
    if wanted is None or wanted == here:
        return here, nodes
    if started and here * nodes > 1:
        raise MiMError(f"-num_gpus {wanted}: {started} has started {here} processes on each machine; leave it out")
    if wanted < 1:
        raise MiMError(f"-num_gpus must be at least 1, got {wanted}")
    return wanted, nodes


def launched_fabric(device: str, devices: int, nodes: int, precision: Any) -> Fabric:
    """Fabric on these devices; with several it has started one process for each, of which this is one.

    Raises:
        MiMError: the machine has fewer devices.
    """
    import torch

    if device == "cuda" and torch.cuda.device_count() < devices:
        raise MiMError(f"-num_gpus {devices}: this machine has {torch.cuda.device_count()}")
    if device == "mps" and devices > 1:
        raise MiMError(f"-num_gpus {devices}: mps has one device")
    strategy: Any = "auto"
    if devices * nodes > 1:
        strategy = DDPStrategy(process_group_backend="nccl" if device == "cuda" else "gloo")
    fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, precision=precision, strategy=strategy)
    fabric.launch()
    if _is_child():
        end_with_parent()
    return fabric


def end_process_group() -> None:
    """Leave the other processes together, when the work is done."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _is_child() -> bool:
    """Whether another process of this command has started this one."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def is_first_rank() -> bool:
    """Whether this is the process that prints and writes, also before the others have been started."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    return rank == "0"


def say(text: str) -> None:
    """Print on the first rank only."""
    if is_first_rank():
        print(printable_lines(text), flush=True)
