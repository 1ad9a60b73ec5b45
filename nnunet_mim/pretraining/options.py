"""Where a run reads and writes, and how this machine computes it. None of this changes what is computed. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nnunet_mim.errors import MiMError
from nnunet_mim.settings import setting
from nnunet_mim.system.machine import usable_cores

VIEWS_PER_PASS = {"cpu": 4, "mps": 32}
"""per device; on CUDA as many as fit into the memory"""
MAX_WORKERS = 12
"""processes that read crops for one device"""


@dataclass(frozen=True)
class DataOptions:
    """Which data a run reads, and which folder it writes."""

    datasets: tuple[str, ...] = setting(
        (),
        "dataset numbers or names; output goes to the first one's results, the others point to it",
        "-d",
        default_text="",
        nargs="+",
        required=True,
        type=str,
        metavar="DATASET",
    )
    plans: str = setting("nnUNetPlans", "plans identifier", "-p", metavar="PLANS")
    configuration: str = setting("3d_fullres", "configuration of the plans", "-c", metavar="CONFIG")
    fold: str = setting(
        "all",
        "leave out this fold's validation cases of labelled datasets and measure on them; 'all' trains on every case "
        "but a few",
        ("-f", "--fold"),
        metavar="FOLD",
    )
    tag: str = setting(
        "", "tag in the output folder's name, to keep several runs", "-o", default_text="none", metavar="TAG"
    )
    resume: bool = setting(
        False, "continue from the latest checkpoint, with the settings of the run", ("--c", "--continue")
    )
    strict: bool = setting(
        False, "stop at a case that cannot be used, instead of naming it and going on without it", "--strict"
    )
    trust_index: bool = setting(
        False,
        "take cases as the case index describes them, without asking for each file at the start: for very many cases "
        "on shared storage; a file that changed is still noticed when it is read",
        "--trust_index",
    )

    def __post_init__(self) -> None:
        if self.fold != "all" and not self.fold.isdigit():
            raise MiMError(f"-f takes 'all' or a fold number, got '{self.fold}'")
        if not re.fullmatch(r"[\w.+-]*", self.tag):
            raise MiMError(f"-o {self.tag}: a tag takes letters, digits, '_', '.', '+' and '-'")

    @property
    def fold_number(self) -> int | None:
        """The fold, or None for all cases."""
        return None if self.fold == "all" else int(self.fold)


@dataclass(frozen=True)
class RunOptions:
    """How a run is computed on a machine; the result is the same but for rounding."""

    num_gpus: int | None = setting(
        None,
        "devices of this machine; the batch is shared among them",
        "-num_gpus",
        default_text="1, or what torchrun or SLURM has started",
        type=int,
    )
    device: str = setting("cuda", "as in nnUNetv2_train", "-device", choices=["cuda", "cpu", "mps"])
    precision: str | None = setting(
        None,
        "arithmetic of the network",
        "--precision",
        default_text="bf16-mixed on cuda, else 32-true",
        choices=["32-true", "bf16-mixed"],
    )
    workers: int | None = setting(
        None,
        "processes that read crops for each device; 0 reads in the main process",
        "--workers",
        default_text=f"1 on a CPU; beside a GPU its share of the cores, at most {MAX_WORKERS}",
        type=int,
    )
    views_per_pass: int | None = setting(
        None,
        "maximum number of views computed at once, which bounds the memory; same result",
        "--views_per_pass",
        default_text="on cuda all views of all levels, or as many as fit; on a CPU 4",
        type=int,
    )
    recompute: tuple[int, ...] = setting(
        (),
        "levels (1 2 3) that keep no activations but compute them again: less memory, more time, same result",
        "--recompute",
        default_text="none",
        nargs="+",
        metavar="LEVEL",
    )
    compile: bool = setting(False, "torch.compile the network; takes minutes at the start", "--compile")
    record: bool = setting(
        True,
        "on GPUs, record a step as a CUDA graph and replay it: much faster where the network is small for the "
        "device; not with --compile or --recompute",
        "--record",
    )
    dry_run: bool = setting(
        False,
        "measure a few real steps and print time, memory and disk of the whole run; nothing is written",
        "--dry-run",
    )

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise MiMError(f"--workers must be 0 or more, got {self.workers}")
        if self.views_per_pass is not None and self.views_per_pass < 1:
            raise MiMError(f"--views_per_pass must be at least 1, got {self.views_per_pass}")
        if not set(self.recompute) <= {1, 2, 3}:
            raise MiMError(f"--recompute takes level numbers 1, 2, 3, got {self.recompute}")
        if self.compile and self.device == "cpu":
            raise MiMError("--compile is for a GPU: on a CPU the step has a faster convolution of its own without it")

    def resolved(self, n_devices: int) -> RunOptions:
        """The options with a number of workers and of views per pass (None: as many as fit), and a precision.

        Args:
            n_devices: devices of this machine that the run uses.
        """
        workers = _default_workers(self.device, n_devices) if self.workers is None else self.workers
        views = VIEWS_PER_PASS.get(self.device) if self.views_per_pass is None else self.views_per_pass
        precision = self.precision or ("bf16-mixed" if self.device == "cuda" else "32-true")
        return replace(self, workers=workers, views_per_pass=views, precision=precision)


def _default_workers(device: str, n_devices: int = 1) -> int:
    """Worker processes for each device: one on a CPU, where computing takes the cores; beside a GPU its share of the
    cores that this process may use but one, at most MAX_WORKERS.
    """
    if device == "cpu":
        return 1
    return max(1, min(MAX_WORKERS, usable_cores() // max(1, n_devices) - 1))
