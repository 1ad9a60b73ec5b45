"""`nnUNetv2_train` with a seed, a length, a number of threads and a record of what it cost, for any trainer:

    seeded_training SEED EPOCHS ITERATIONS VAL_ITERATIONS THREADS COST COMMAND ARGUMENTS…

ITERATIONS are those of an epoch; COST is a file; COMMAND is nnUNetv2_train, or another installed command with its
ARGUMENTS. The seed decides the initial weights; the order of the patches stays random, since nnU-Net's augmentation
draws in processes of its own.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nnunet_mim.files import write_atomically

CHECKPOINTS = 4
"""how often a training is saved, so that an interrupted one can go on"""


def main(argv: list[str]) -> None:
    """Train. The first words of `argv` are those above; 0 threads leaves them to nnU-Net."""
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_mim.pretraining.ranks import end_with_parent

    end_with_parent()  # else a training would go on beside its successor when the experiment is killed
    seed, epochs, iterations, val_iterations, threads = map(int, argv[:5])
    cost, command = Path(argv[5]), argv[6]
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
        torch.set_num_threads = lambda nthreads: None  # nnU-Net takes all cores of the machine
    entry = installed_command(command)
    set_length(nnUNetTrainer, epochs, iterations, val_iterations)
    record_cost(nnUNetTrainer, cost, time.time())
    sys.argv = [command, *argv[7:]]
    entry()


def installed_command(name: str) -> Callable[[], Any]:
    """The function behind an installed command.

    Raises:
        SystemExit: it is not installed.
    """
    found = next((entry for entry in entry_points(group="console_scripts") if entry.name == name), None)
    if found is None:
        sys.exit(f"{name} is not installed: install an nnU-Net that has it")
    return found.load()


def set_length(trainer: type, epochs: int, iterations: int, val_iterations: int) -> None:
    """Give a trainer class, and those derived from it, another length."""
    original = trainer.initialize  # type: ignore[attr-defined]

    def initialize(self: Any) -> None:  # after every __init__, before the learning rate is scheduled
        self.num_epochs = epochs
        self.num_iterations_per_epoch = iterations
        self.num_val_iterations_per_epoch = val_iterations
        self.save_every = max(1, epochs // CHECKPOINTS)
        original(self)

    trainer.initialize = initialize  # type: ignore[attr-defined]


def record_cost(trainer: type, file: Path, began: float) -> None:
    """Have a trainer class, and those derived from it, keep the cost of every attempt in a file: when it began, seconds
    until its last epoch or the end of its validation, highest memory of the device (of the process on a CPU), bytes,
    and the network's parameters.
    """
    methods = ("on_epoch_end", "perform_actual_validation")
    attempts = [a for a in attempts_of(file) if a["began"] != began]

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *arguments: Any, **options: Any) -> Any:
            result = original(self, *arguments, **options)
            attempt = {
                "began": began,
                "seconds": time.time() - began,
                "peak_bytes": _peak_bytes(self.device),
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "device": _device_name(self.device),
            }
            write_atomically(file, json.dumps([*attempts, attempt]).encode())
            return result

        return method

    for name in methods:
        setattr(trainer, name, recording(getattr(trainer, name)))


def attempts_of(file: Path) -> list[dict[str, Any]]:
    """What `record_cost` kept; nothing where there is no such file yet."""
    return json.loads(file.read_text()) if file.is_file() else []


def _peak_bytes(device: Any) -> int:
    import resource

    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


if __name__ == "__main__":
    main(sys.argv[1:])
