"""`nnUNetv2_train` with a seed, a length, a number of threads and a record of what it cost, for any trainer:

    seeded_training PARENT SEED EPOCHS ITERATIONS VAL_ITERATIONS THREADS COST COMMAND ARGUMENTS…

The training ends with the process PARENT; ITERATIONS are those of an epoch; COST is a file; COMMAND is nnUNetv2_train,
or another installed command with its ARGUMENTS. The seed decides the initial weights; the order of the patches stays
random, since nnU-Net's augmentation draws in separate processes.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from filelock import FileLock

from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.processes import end_with_parent


@dataclass(frozen=True)
class Length:
    """The length of a training."""

    epochs: int
    iterations: int
    """per epoch"""
    val_iterations: int
    """per epoch"""


def main(argv: list[str]) -> None:
    """Train with the arguments of the module's docstring; 0 threads: as nnU-Net sets them."""
    parent, seed, epochs, iterations, val_iterations, threads = map(int, argv[:6])
    cost, command = Path(argv[6]), argv[7:]
    end_with_parent(parent)
    with FileLock(cost.with_name(".training.lock"), timeout=60):  # until one whose parent was killed has ended
        _train(seed, Length(epochs, iterations, val_iterations), threads, cost, command)


def _train(seed: int, length: Length, threads: int, cost: Path, command: list[str]) -> None:
    """Run nnU-Net's command in this process."""
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
        torch.set_num_threads = lambda nthreads: None  # nnU-Net takes all cores of the machine
    entry = installed_command(command[0])
    if entry is None:
        sys.exit(f"{command[0]} is not installed: install an nnU-Net that has it")
    _set_length(nnUNetTrainer, length)
    _save_whole(nnUNetTrainer)
    _record_cost(nnUNetTrainer, cost, time.time())
    sys.argv = command
    entry.load()()


def installed_command(name: str) -> EntryPoint | None:
    """The entry point of an installed command; None where there is no such command."""
    return next((entry for entry in entry_points(group="console_scripts") if entry.name == name), None)


def _save_whole(trainer: Any) -> None:
    """Make a trainer class, and those derived from it, write checkpoints completely or not at all: nnU-Net cannot
    continue from half a checkpoint.
    """
    original = trainer.save_checkpoint

    def save_checkpoint(self: Any, filename: str) -> None:
        partial = f"{filename}.partial"
        original(self, partial)
        if os.path.isfile(partial):  # not where checkpoints are switched off
            os.replace(partial, filename)

    trainer.save_checkpoint = save_checkpoint


def _set_length(trainer: Any, length: Length) -> None:
    """Give a trainer class, and those derived from it, another length."""
    original = trainer.initialize

    def initialize(self: Any) -> None:  # after every __init__, before the learning rate is scheduled
        self.num_epochs = length.epochs
        self.num_iterations_per_epoch = length.iterations
        self.num_val_iterations_per_epoch = length.val_iterations
        self.save_every = max(1, min(self.save_every, length.epochs // 4))  # so that short trainings can continue too
        original(self)

    trainer.initialize = initialize


def _record_cost(trainer: Any, file: Path, began: float) -> None:
    """Make a trainer class, and those derived from it, write the cost of every attempt to a file.

    That is: its begin, seconds until its last epoch or the end of its validation, maximum memory of the device (of the
    process on a CPU) in bytes, and the number of the network's parameters.
    """
    former = [attempt for attempt in attempts_of(file) if attempt["began"] != began]

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            result = original(self, *arguments, **options)
            peak_bytes, device = _memory(self.device)
            attempt = {
                "began": began,
                "seconds": time.time() - began,
                "peak_bytes": peak_bytes,
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "device": device,
            }
            write_atomically(file, json.dumps([*former, attempt]).encode())
            return result

        return method

    for name in ("on_epoch_end", "perform_actual_validation"):
        setattr(trainer, name, recording(getattr(trainer, name)))


def attempts_of(file: Path) -> list[dict[str, Any]]:
    """What `_record_cost` has written; nothing where there is no such file yet."""
    from nnunet_mim.benchmarking.documents import ATTEMPTS_SCHEMA, read_kept  # PyTorch is slow to import

    return read_kept(file, ATTEMPTS_SCHEMA, "delete it") if file.is_file() else []


def _memory(device: Any) -> tuple[int, str]:
    """(maximum memory in bytes, name of the device)."""
    import resource

    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)), torch.cuda.get_device_name(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, str(device.type)


if __name__ == "__main__":
    main(sys.argv[1:])
