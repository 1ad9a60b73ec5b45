"""One training of an experiment: nnU-Net's own commands in folders of its own, and what came out of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnunet_mim.benchmarking.metrics import case_metrics
from nnunet_mim.errors import MiMError
from nnunet_mim.files import write_atomically
from nnunet_mim.pretraining.sources import Source
from nnunet_mim.trainers.checkpoint import ENV_CHECKPOINT
from nnunet_mim.trainers.finetune_config import PLANS_KEY, FinetuneConfig

RESULT = "result.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Arm:
    """What is compared: a trainer with plans and, for MiM, a pretraining."""

    name: str
    trainer: str
    source: Source = field(repr=False)
    """the dataset as preprocessed for the plans"""
    checkpoint: str | None = None

    @property
    def is_mim(self) -> bool:
        """Whether the plans' recipe decides about the training."""
        return self.trainer.startswith("nnUNetTrainerMiM")


@dataclass(frozen=True)
class Length:
    """Of a training."""

    epochs: int
    iterations: int
    """per epoch"""
    val_iterations: int


@dataclass(frozen=True)
class Cell:
    """One training."""

    arm: Arm
    fold: int
    train_cases: tuple[str, ...]
    val_cases: tuple[str, ...]
    seed: int
    length: Length
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of the recipe, for MiM trainers"""

    def key(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        return {
            "dataset": self.arm.source.dataset,
            "plans": self.arm.source.plans_name,
            "configuration": self.arm.source.configuration,
            "trainer": self.arm.trainer,
            "checkpoint": self.arm.checkpoint,
            "fold": self.fold,
            "train_cases": list(self.train_cases),
            "val_cases": list(self.val_cases),
            "seed": self.seed,
            "length": asdict(self.length),
            "settings": dict(self.settings),
        }


def finished(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The result of a cell that has been run.

    Raises:
        MiMError: the folder holds the result of another one.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    now = json.loads(json.dumps(cell.key()))
    changed = [f"{k} {stored['key'].get(k)} -> {v}" for k, v in now.items() if stored["key"].get(k) != v]
    if changed:
        raise MiMError(f"{folder} holds another experiment ({'; '.join(changed)[:300]}): give another -o, or delete it")
    return stored


def run_cell(cell: Cell, folder: Path, device: str, threads: int) -> dict[str, Any]:
    """Train and validate, going on where an earlier attempt was interrupted; keeps and returns the result.

    Args:
        cell: what.
        folder: of this cell alone.
        device: as for nnUNetv2_train.
        threads: of PyTorch; 0: as nnU-Net sets them.

    Raises:
        MiMError: the training failed; names its log.
    """
    environment = _write_folders(cell, folder)
    output = _output(cell, folder)
    source, length = cell.arm.source, cell.length
    command = [sys.executable, "-m", "nnunet_mim.benchmarking.seeded_training"]
    command += [str(n) for n in (cell.seed, length.epochs, length.iterations, length.val_iterations, threads)]
    command += [source.dataset, source.configuration, str(cell.fold), "-tr", cell.arm.trainer, "-p", source.plans_name]
    command += ["-device", device]
    if (output / "checkpoint_final.pth").is_file():
        command.append("--val")
    elif (output / "checkpoint_latest.pth").is_file():
        command.append("--c")
    began = time.time()
    with (folder / LOG).open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode or not (output / "validation" / "summary.json").is_file():
        last = (folder / LOG).read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise MiMError(f"training failed, see {folder / LOG} ({last[0][:200]}): repeat the command to try again")
    result = {"key": cell.key(), **read_result(cell, output), "seconds": time.time() - began}
    write_atomically(folder / RESULT, json.dumps(result).encode())
    return result


def read_result(cell: Cell, output: Path) -> dict[str, Any]:
    """Metrics per case and label, learning curve, and seen cases, of a finished training."""
    import torch

    summary = json.loads((output / "validation" / "summary.json").read_text())
    labels = [int(label) for label in summary["mean"]]
    ending = json.loads((cell.arm.source.folder.parent / "dataset.json").read_text())["file_ending"]
    cases = {}
    for entry in summary["metric_per_case"]:
        prediction, reference = Path(entry["prediction_file"]), Path(entry["reference_file"])
        cases[prediction.name.removesuffix(ending)] = case_metrics(prediction, reference, labels)
    stored = torch.load(output / "checkpoint_final.pth", map_location="cpu", weights_only=False)  # our own training's
    transfer = output / "mim_transfer.json"
    leaked = json.loads(transfer.read_text())["leaked_cases"] if transfer.is_file() and cell.arm.checkpoint else []
    curve = [float(value) for value in stored["logging"]["ema_fg_dice"]]
    return {"cases": cases, "curve": curve, "leaked": leaked}


def _output(cell: Cell, folder: Path) -> Path:
    source = cell.arm.source
    name = f"{cell.arm.trainer}__{source.plans_name}__{source.configuration}"
    return folder / "nnUNet_results" / source.dataset / name / f"fold_{cell.fold}"


def _write_folders(cell: Cell, folder: Path) -> dict[str, str]:
    """nnU-Net's folders of this cell: links to the preprocessed dataset, with a split and plans of its own. Returns the
    environment of its commands.
    """
    source = cell.arm.source
    base, real = folder / "nnUNet_preprocessed" / source.dataset, source.folder.parent
    shutil.rmtree(folder / "nnUNet_preprocessed", ignore_errors=True)
    base.mkdir(parents=True)
    plans_file = f"{source.plans_name}.json"
    for name in ("dataset.json", "dataset_fingerprint.json", "gt_segmentations", source.folder.name):
        if (real / name).exists():
            os.symlink((real / name).resolve(), base / name)
    split = {"train": list(cell.train_cases), "val": list(cell.val_cases)}
    (base / "splits_final.json").write_text(json.dumps([split] * (cell.fold + 1)))
    plans = dict(source.plans)
    if cell.arm.is_mim:
        plans[PLANS_KEY] = recipe_of(cell.arm, cell.length, cell.settings).to_dict()
    (base / plans_file).write_text(json.dumps(plans))
    environment = dict(os.environ)
    environment |= {f"nnUNet_{name}": str(folder / f"nnUNet_{name}") for name in ("preprocessed", "results")}
    environment.setdefault("nnUNet_raw", str(folder))
    environment.pop(ENV_CHECKPOINT, None)
    if cell.arm.checkpoint:
        environment[ENV_CHECKPOINT] = cell.arm.checkpoint
    return environment


def recipe_of(arm: Arm, length: Length, settings: Mapping[str, Any]) -> FinetuneConfig:
    """The plans' recipe with another length and other settings. MiMError where a setting is bad."""
    own = {
        "num_epochs": length.epochs,
        "iterations_per_epoch": length.iterations,
        "val_iterations_per_epoch": length.val_iterations,
    }
    return FinetuneConfig.from_plans({PLANS_KEY: {**arm.source.plans.get(PLANS_KEY, {}), **settings, **own}})


def nested_subset(cases: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """`count` of some cases, by chance; of one seed each larger subset holds the smaller ones."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(cases))
    return tuple(sorted(cases[i] for i in order[:count]))
