"""One training of an experiment: nnU-Net's own commands in folders of its own, and what came out of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import IO, Any

from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, load_summary_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.benchmarking.metrics import case_metrics
from nnunet_mim.benchmarking.seeded_training import Length, attempts_of
from nnunet_mim.checkpoint.locate import ENV_CHECKPOINT, FINAL, LATEST, WEIGHTS
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.files import write_atomically
from nnunet_mim.trainers.finetune_config import PLANS_KEY, FinetuneConfig

KEY, RESULT, COST, FAILED = "key.json", "result.json", "cost.json", "failed.txt"
LOG = "log.txt"
LOOK_EVERY = 0.5
"""seconds between looks at a training"""
TRAIN = "nnUNetv2_train"


@dataclass(frozen=True)
class Arm:
    """What is compared: a trainer with plans and, for MiM, a pretraining."""

    name: str
    trainer: str
    source: Source = field(repr=False)
    """the dataset as preprocessed for the plans"""
    checkpoint: str | None = None
    command: str = TRAIN
    """that trains; others with the same arguments take their checkpoint from the plans"""

    @property
    def is_mim(self) -> bool:
        """Whether the plans' recipe decides about the training."""
        return self.trainer.startswith("nnUNetTrainerMiM")

    @property
    def is_control(self) -> bool:
        """Whether it is the control of this package, which starts from random weights."""
        return self.trainer.startswith("nnUNetTrainerMiMScratch")

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """Hashes of the plans and of the checkpoint."""
        plans = {k: v for k, v in self.source.plans.items() if k not in (PLANS_KEY, "pretrain_info")}
        # with the defaults of what the plans leave open: these may change with a new version of the package
        recipe = FinetuneConfig().to_dict() | self.source.plans.get(PLANS_KEY, {}) if self.is_mim else {}
        text = json.dumps([plans, recipe], sort_keys=True)
        return {
            "plans_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "checkpoint_sha256": checkpoint_sha256(Path(self.checkpoint)) if self.checkpoint else None,
        }


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

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        """Of the preprocessed dataset."""
        return json.loads((self.arm.source.folder.parent / "dataset.json").read_text())

    @property
    def references(self) -> Path:
        """nnU-Net's copies of the labels."""
        return self.arm.source.folder.parent / "gt_segmentations"

    def key(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        return {
            "dataset": self.arm.source.dataset,
            "plans": self.arm.source.plans_name,
            "configuration": self.arm.source.configuration,
            "trainer": self.arm.trainer,
            "command": self.arm.command,
            "checkpoint": self.arm.checkpoint,
            "fold": self.fold,
            "train_cases": list(self.train_cases),
            "val_cases": list(self.val_cases),
            "seed": self.seed,
            "length": asdict(self.length),
            "settings": dict(self.settings),
            **self.arm.identity,
        }


def finished(cell: Cell, folder: Path, tolerance: float) -> dict[str, Any] | None:
    """The result of a cell that has been run. Where it was measured with another tolerance (mm), its predictions are
    measured again.

    Raises:
        MiMError: the folder holds another one, finished or not.
    """
    if not (folder / KEY).is_file():
        return None
    stored, now = json.loads((folder / KEY).read_text()), json.loads(json.dumps(cell.key()))
    decides = [name for name in now if name != "checkpoint"]  # its content does, and may have moved
    changed = [f"{name} {stored.get(name)} -> {now[name]}" for name in decides if stored.get(name) != now[name]]
    if changed:
        raise MiMError(
            f"{folder} holds another experiment ({'; '.join(changed)[:300]}): give another output folder, or delete it"
        )
    if not (folder / RESULT).is_file():
        return None
    result = json.loads((folder / RESULT).read_text())
    if result["tolerance"] != tolerance:
        result = {**result, **read_result(cell, _output(cell, folder), tolerance)}
        write_atomically(folder / RESULT, json.dumps(result).encode())
    return result


class InterruptedTrainingError(MiMError):
    """A training was ended from outside; it goes on where it was when the command is repeated."""


def run_cell(
    cell: Cell,
    folder: Path,
    device: str,
    threads: int,
    tolerance: float,
    gpu: str | None = None,
    stop: Event | None = None,
) -> dict[str, Any]:
    """Train and validate, going on where an earlier attempt was interrupted; keeps and returns the result, or why there
    is none.

    Args:
        cell: what.
        folder: of this cell alone.
        device: as for nnUNetv2_train.
        threads: of PyTorch; 0: as nnU-Net sets them.
        tolerance: of the normalised surface Dice, mm.
        gpu: the only one that it sees (CUDA_VISIBLE_DEVICES); None: as this process.
        stop: ends the training when it is set.

    Raises:
        MiMError: the training failed; names its log.
        InterruptedTrainingError: it was ended from outside; that is no failure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    try:
        return _run_cell(cell, folder, device, threads, tolerance, gpu, stop)
    except InterruptedTrainingError:
        raise
    except (MiMError, OSError, ValueError, KeyError) as error:
        kind = "" if isinstance(error, MiMError) else f"{type(error).__name__}: "
        write_atomically(folder / FAILED, f"{kind}{error}".encode())
        raise


def failure(folder: Path) -> str | None:
    """Why the last attempt at a cell ended; None where it did not fail."""
    try:
        return (folder / FAILED).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _run_cell(
    cell: Cell, folder: Path, device: str, threads: int, tolerance: float, gpu: str | None, stop: Event | None
) -> dict[str, Any]:
    write_atomically(folder / KEY, json.dumps(cell.key()).encode())
    environment = _write_folders(cell, folder)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    output = _output(cell, folder)
    source, length = cell.arm.source, cell.length
    command = [sys.executable, "-m", "nnunet_mim.benchmarking.seeded_training"]
    command += [
        str(n) for n in (os.getpid(), cell.seed, length.epochs, length.iterations, length.val_iterations, threads)
    ]
    command += [str(folder / COST), cell.arm.command]
    command += [source.dataset, source.configuration, str(cell.fold), "-tr", cell.arm.trainer, "-p", source.plans_name]
    command += ["-device", device]
    if (output / FINAL).is_file():
        command.append("--val")
    elif (output / LATEST).is_file():
        command.append("--c")
    elif cell.arm.checkpoint and not cell.arm.is_mim and cell.arm.command == TRAIN:
        command += ["-pretrained_weights", cell.arm.checkpoint]
    with (folder / LOG).open("a") as log:
        returned = _run(command, log, environment, stop)
    if returned in (-signal.SIGTERM, -signal.SIGINT):
        raise InterruptedTrainingError(f"interrupted, see {folder / LOG}")
    if returned or not (output / "validation" / "summary.json").is_file():
        last = (folder / LOG).read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise MiMError(f"training failed, see {folder / LOG} ({last[0][:200]})")
    result = {"key": cell.key(), **read_result(cell, output, tolerance), "cost": total_cost(folder / COST)}
    write_atomically(folder / RESULT, json.dumps(result).encode())
    return result


def _run(command: Sequence[str], log: IO[str], environment: Mapping[str, str], stop: Event | None) -> int:
    """Run a command to its end, or end it; Ctrl-C in the terminal does not reach it. Returns its exit code."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )  # fmt: skip
    try:
        while stop is None or not stop.is_set():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_EVERY)
        os.killpg(process.pid, signal.SIGTERM)  # with the processes that read and augment
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def total_cost(file: Path) -> dict[str, Any]:
    """Of all attempts at a cell: seconds in all, highest memory in bytes, parameters, device. Empty if unknown."""
    attempts = attempts_of(file)
    if not attempts:
        return {}
    return {
        **attempts[-1],
        "seconds": sum(attempt["seconds"] for attempt in attempts),
        "peak_bytes": max(attempt["peak_bytes"] for attempt in attempts),
    }


def read_result(cell: Cell, output: Path, tolerance: float) -> dict[str, Any]:
    """Metrics per case and label, learning curve, and names of the labels, of a finished training."""
    import torch

    summary = load_summary_json(str(output / "validation" / "summary.json"))
    dataset_json = cell.dataset_json
    ending = dataset_json["file_ending"]
    manager = PlansManager(dict(cell.arm.source.plans))
    ignore, reader = manager.get_label_manager(dataset_json).ignore_label, manager.image_reader_writer_class()
    cases = {}
    for entry in summary["metric_per_case"]:
        name = Path(entry["prediction_file"]).name  # the folders may have moved since
        files = output / "validation" / name, cell.references / name
        cases[name.removesuffix(ending)] = case_metrics(*files, list(summary["mean"]), reader, ignore, tolerance)
    stored = torch.load(output / FINAL, map_location="cpu", weights_only=False)  # our own training's
    curve = [float(value) for value in stored["logging"]["mean_fg_dice"]]
    if len(curve) != cell.length.epochs:
        raise MiMError(
            f"{output} was trained for {len(curve)} epochs, not {cell.length.epochs}: another trainer's length?"
        )
    names = {
        label_or_region_to_key(tuple(value) if isinstance(value, list) else value): name
        for name, value in dataset_json["labels"].items()
    }
    return {"cases": cases, "curve": curve, "names": names, "tolerance": tolerance}


def validation_folder(cell: Cell, folder: Path) -> Path:
    """Where a finished cell's predictions of its validation cases are."""
    return _output(cell, folder) / "validation"


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
    folders = [path.name for path in real.iterdir() if path.is_dir()]  # of other configurations too: nnU-Net may look
    for name in ("dataset.json", "dataset_fingerprint.json", *folders):
        if (real / name).exists():
            try:
                os.symlink((real / name).resolve(), base / name)
            except OSError as error:
                raise MiMError(
                    f"cannot link {base / name} ({error.strerror}): allow links, or take another output folder"
                ) from error
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
    if cell.arm.checkpoint and cell.arm.is_mim:
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


def checkpoint_sha256(path: Path) -> str:
    """Of a file, or of the weights in a folder of `mim_export`."""
    return hashlib.sha256((path / WEIGHTS if path.is_dir() else path).read_bytes()).hexdigest()


def nested_subset(cases: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """`count` of some cases, by chance; of one seed each larger subset holds the smaller ones."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(cases))
    return tuple(sorted(cases[i] for i in order[:count]))
