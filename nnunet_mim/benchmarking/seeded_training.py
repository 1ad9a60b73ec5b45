"""`nnUNetv2_train` with a seed, a length and a number of threads, for any trainer:

    python -m nnunet_mim.benchmarking.seeded_training SEED EPOCHS ITERATIONS VAL_ITERATIONS THREADS ARGUMENTS…

ITERATIONS are those of an epoch; ARGUMENTS are those of nnUNetv2_train. The seed decides the initial weights; the order
of the patches stays random, since nnU-Net's augmentation draws in processes of its own.
"""

from __future__ import annotations

import random
import sys
from typing import Any

CHECKPOINTS = 4
"""how often a training is saved, so that an interrupted one can go on"""


def main(argv: list[str]) -> None:
    """Train. The first five words of `argv` are numbers, see above; 0 threads leaves them to nnU-Net."""
    import numpy as np
    import torch
    from nnunetv2.run import run_training
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    seed, epochs, iterations, val_iterations, threads = map(int, argv[:5])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
        torch.set_num_threads = lambda nthreads: None  # nnU-Net takes all cores of the machine
    set_length(nnUNetTrainer, epochs, iterations, val_iterations)
    sys.argv = ["nnUNetv2_train", *argv[5:]]
    run_training.run_training_entry()


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


if __name__ == "__main__":
    main(sys.argv[1:])
