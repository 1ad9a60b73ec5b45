"""Running one training of an experiment: nnU-Net's own commands in separate folders, and the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, load_summary_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.benchmarking.bench_file import TRAIN
from nnunet_mim.benchmarking.cell import Cell
from nnunet_mim.benchmarking.documents import KEY_SCHEMA, read_kept, read_result
from nnunet_mim.benchmarking.external import ExternalSet, link_images
from nnunet_mim.benchmarking.metrics import compared
from nnunet_mim.benchmarking.seeded_training import attempts_of
from nnunet_mim.checkpoint.locate import ENV_CHECKPOINT, FINAL, LATEST
from nnunet_mim.checkpoint.torch_file import ALLOWING
from nnunet_mim.errors import MiMError, printable
from nnunet_mim.pretraining.stopping import EXIT_CODE
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.locks import exclusive_lock
from nnunet_mim.system.processes import run_command
from nnunet_mim.trainers.finetune_config import PLANS_KEY

KEY, RESULT, COST, FAILED, LOG = "key.json", "result.json", "cost.json", "failed.txt", "log.txt"
BUSY = "another process is at work on it"


class InterruptedTrainingError(MiMError):
    """A training was ended from outside; it continues when the command is repeated."""


class KeptTraining:
    """One training of an experiment, which is kept in a folder of its own.

    It can be called on this machine, or as a job of SLURM.
    """

    folder: Path
    """of this training only"""

    def key(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values. The path `checkpoint` may change: its hash decides."""
        raise NotImplementedError

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished training, or None. Raises MiMError where the folder holds another experiment."""
        raise NotImplementedError

    def compute(self, gpu: str | None, stop: Event | None) -> dict[str, Any]:
        """Begin or continue, and return the result; raises as `train`."""
        raise NotImplementedError

    def environment(self, gpu: str | None) -> dict[str, str]:
        """The environment of its commands."""
        raise NotImplementedError

    def is_this_one(self) -> bool:
        """Whether the folder holds this training, finished or not. Raises MiMError where it holds another one."""
        if not (self.folder / KEY).is_file():
            return False
        stored, now = read_kept(self.folder / KEY, KEY_SCHEMA), json.loads(json.dumps(self.key()))
        now.pop("checkpoint", None)
        changed = [f"{name} {stored.get(name)} -> {now[name]}" for name in now if stored.get(name) != now[name]]
        if changed:
            differences = printable("; ".join(changed), 300)
            raise MiMError(f"{self.folder} holds another experiment ({differences}): give another output, or delete it")
        return True

    def failure(self) -> str | None:
        """Why the last attempt ended; None where it did not fail."""
        with suppress(FileNotFoundError):
            return (self.folder / FAILED).read_text(encoding="utf-8")
        return None

    def __call__(self, gpu: str | None = None, stop: Event | None = None) -> dict[str, Any]:
        """Train, unless another process has done so meanwhile. Raises MiMError as `train`, or with BUSY."""
        with exclusive_lock(self.folder / ".lock", BUSY):
            return self.finished() or self.train(gpu, stop)

    def checkpoint(self, *_: Any) -> Any:
        """The job that submitit queues when the time of this one is over: the same, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def train(self, gpu: str | None = None, stop: Event | None = None) -> dict[str, Any]:
        """Train, continuing an interrupted attempt. Writes the result, which it returns, or why it failed.

        `gpu` is as in CUDA_VISIBLE_DEVICES, None as in this process; `stop` ends the training when it is set. Raises
        MiMError with the log where it fails, InterruptedTrainingError where it was ended from outside.
        """
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        try:
            write_atomically(folder / KEY, json.dumps(self.key()).encode())
            result = self.compute(gpu, stop)
            write_atomically(folder / RESULT, json.dumps(result).encode())
            return result
        except InterruptedTrainingError:
            raise
        except (MiMError, OSError, ValueError, KeyError) as error:
            write_atomically(folder / FAILED, reason_of(error).encode())
            raise

    def _run(self, command: list[str], made: Iterable[Path], gpu: str | None, stop: Event | None) -> None:
        """Run a command that makes these files. Raises as `train`."""
        log_file = self.folder / LOG
        exit_code = run_command(command, log_file, self.environment(gpu), stop)
        if exit_code in (-signal.SIGTERM, -signal.SIGINT, EXIT_CODE):
            raise InterruptedTrainingError(f"interrupted, see {log_file}")
        if exit_code or not all(path.is_file() for path in made):
            last = log_file.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise MiMError(f"training failed, see {log_file} ({last[0][:200]})")


@dataclass(frozen=True)
class Training(KeptTraining):
    """A cell with its folder and device."""

    cell: Cell
    folder: Path
    """of this cell only"""
    device: str
    """as for nnUNetv2_train"""
    tolerance: float
    """of the normalised surface Dice, mm"""
    threads: int = 0
    """number of PyTorch's threads; 0: as nnU-Net sets it"""
    tests: tuple[ExternalSet, ...] = ()
    """other datasets, whose cases the finished network predicts"""

    @property
    def output(self) -> Path:
        """nnU-Net's output folder."""
        source = self.cell.arm.source
        name = f"{self.cell.arm.spec.trainer}__{source.plans_name}__{source.configuration}"
        return self.folder / "nnUNet_results" / source.dataset / name / f"fold_{self.cell.fold}"

    def key(self) -> dict[str, Any]:
        """That of the cell."""
        return self.cell.key()

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished training, or None. Raises MiMError where the folder holds another experiment.

        It is not finished where a test set is missing. If it was measured with another tolerance, its predictions are
        measured again.
        """
        if not self.is_this_one() or not (self.folder / RESULT).is_file():
            return None
        result = read_result(self.folder / RESULT, self.cell.val_cases)
        tested = result.get("tests", {})
        if any(tested.get(test.dataset, {}).keys() != test.references.keys() for test in self.tests):
            return None
        if result["tolerance"] != self.tolerance:
            result = {**result, **self.measured()}
            write_atomically(self.folder / RESULT, json.dumps(result).encode())
        return result

    def compute(self, gpu: str | None, stop: Event | None) -> dict[str, Any]:
        """Train, validate and test; what is there is kept."""
        folder = self.folder
        self._write_folders()
        summary = self.output / "validation" / "summary.json"
        if not ((folder / RESULT).is_file() and summary.is_file()):  # else only a test set is new
            self._run(self.command(), [summary], gpu, stop)
        for test in self.tests:
            self._predict(test, gpu, stop)
        return {"key": self.key(), **self.measured(), "cost": _total_cost(folder / COST)}

    def _predict(self, test: ExternalSet, gpu: str | None, stop: Event | None) -> None:
        """Predict the cases of a test set, unless they are predicted; the folder appears whole or not at all."""
        folder = self.predictions(test)
        if all((folder / path.name).is_file() for path in test.references.values()):
            return
        images, partial = folder.with_name("images"), folder.with_name("predictions.partial")
        for old in (images, partial, folder):
            shutil.rmtree(old, ignore_errors=True)
        link_images(test, images)
        spec, source = self.cell.arm.spec, self.cell.arm.source
        command = [*self._seeded(), "nnUNetv2_predict", "-i", str(images), "-o", str(partial), "-d", source.dataset]
        command += ["-p", source.plans_name, "-c", source.configuration, "-tr", spec.trainer, "-device", self.device]
        command += ["-f", str(self.cell.fold), "-npp", "1", "-nps", "1"]
        self._run(command, [partial / path.name for path in test.references.values()], gpu, stop)
        partial.rename(folder)

    def predictions(self, test: ExternalSet | None = None) -> Path:
        """Folder of the predicted label images: of the validation cases, or of a test set."""
        return self.folder / "test" / test.dataset / "predictions" if test else self.output / "validation"

    def _seeded(self) -> list[str]:
        """The command that runs one of nnU-Net's with this cell's seed, length and threads, without that one."""
        length = self.cell.length
        numbers = os.getpid(), self.cell.seed, length.epochs, length.iterations, length.val_iterations, self.threads
        command = [sys.executable, "-m", "nnunet_mim.benchmarking.seeded_training", *map(str, numbers)]
        return [*command, str(self.folder / COST)]

    def command(self) -> list[str]:
        """The command that begins or continues the training."""
        spec, source = self.cell.arm.spec, self.cell.arm.source
        command = [*self._seeded(), spec.command, source.dataset, source.configuration, str(self.cell.fold)]
        command += ["-tr", spec.trainer, "-p", source.plans_name, "-device", self.device]
        if (self.output / FINAL).is_file():
            return [*command, "--val"]
        if (self.output / LATEST).is_file():
            return [*command, "--c"]
        if self.cell.arm.checkpoint and not spec.is_mim and spec.command == TRAIN:
            return [*command, "-pretrained_weights", self.cell.arm.checkpoint]
        return command

    def environment(self, gpu: str | None) -> dict[str, str]:
        """The environment of the command."""
        environment = {"nnUNet_raw": str(self.folder), **os.environ}
        if self.threads:  # nnU-Net starts eight processes to write predictions, which takes half a minute on two cores
            environment.setdefault("nnUNet_def_n_proc", str(self.threads))
        environment |= {name: str(self.folder / name) for name in ("nnUNet_preprocessed", "nnUNet_results")}
        environment.pop(ENV_CHECKPOINT, None)
        if self.cell.arm.checkpoint and self.cell.arm.spec.is_mim:
            environment[ENV_CHECKPOINT] = self.cell.arm.checkpoint
        return environment | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})

    def _write_folders(self) -> None:
        """Write nnUNet_preprocessed of this training: links to the preprocessed dataset, its own split and plans."""
        cell, source = self.cell, self.cell.arm.source
        base = self.folder / "nnUNet_preprocessed" / source.dataset
        shutil.rmtree(base.parent, ignore_errors=True)
        base.mkdir(parents=True)
        for path in source.folder.parent.iterdir():  # other configurations too
            if path.is_dir() or path.name in ("dataset.json", "dataset_fingerprint.json"):
                link = base / path.name
                try:
                    link.symlink_to(path.resolve())
                except OSError as error:
                    remedy = "allow links, or give another output folder"
                    raise MiMError(f"cannot link {link} ({error.strerror}): {remedy}") from error
        split = {"train": list(cell.train_cases), "val": list(cell.val_cases)}
        (base / "splits_final.json").write_text(json.dumps([split] * (cell.fold + 1)))
        plans = {**source.plans, PLANS_KEY: cell.recipe().to_dict()} if cell.arm.spec.is_mim else dict(source.plans)
        (base / f"{source.plans_name}.json").write_text(json.dumps(plans))

    def measured(self) -> dict[str, Any]:
        """Metrics per case and label, learning curve, names of the labels and the same metrics of every test set, of
        the finished training.
        """
        dataset_json, output = self.cell.dataset_json, self.output
        summary = load_summary_json(str(output / "validation" / "summary.json"))
        ending, labels = dataset_json["file_ending"], list(summary["mean"])
        names = [Path(entry["prediction_file"]).name for entry in summary["metric_per_case"]]
        cases = [name.removesuffix(ending) for name in names]  # the folders may have moved since
        metrics = self._compared(self.predictions(), {case: self.cell.reference(case) for case in cases}, labels)
        tests = {test.dataset: self._compared(self.predictions(test), test.references, labels) for test in self.tests}
        curve = learning_curve(output / FINAL)
        if len(curve) != (epochs := self.cell.length.epochs):
            raise MiMError(f"{output} was trained for {len(curve)} epochs, not {epochs}: another trainer's length?")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in dataset_json["labels"].items()}
        label_names = {label_or_region_to_key(value): name for name, value in values.items()}
        result = {"cases": metrics, "curve": curve, "names": label_names, "tolerance": self.tolerance}
        return {**result, "tests": tests} if tests else result

    def _compared(self, predictions: Path, references: Mapping[str, Path], labels: list[Any]) -> dict[str, Any]:
        """Metrics by case and label of predictions, which have their references' names."""
        manager = PlansManager(dict(self.cell.arm.source.plans))
        ignore = manager.get_label_manager(self.cell.dataset_json).ignore_label
        reader = manager.image_reader_writer_class()
        pairs = [(predictions / reference.name, reference) for reference in references.values()]
        items = [(*pair, labels, reader, ignore, self.tolerance) for pair in pairs]
        return dict(zip(references, compared(items), strict=True))


def learning_curve(checkpoint: Path) -> list[float]:
    """Mean Dice of every epoch in a checkpoint of nnU-Net's trainer; nothing in it is run.

    Raises:
        MiMError: it cannot be read, or holds more than tensors and plain values.
    """
    import torch

    scalar = np.float64(0).__reduce__()[0]  # what NumPy's numbers refer to; its module has had two names
    allowed: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8"))]
    try:
        with ALLOWING, torch.serialization.safe_globals(allowed):
            stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return [float(value) for value in stored["logging"]["mean_fg_dice"]]
    except Exception as error:  # PyTorch has many
        raise MiMError(
            f"{checkpoint} holds no learning curve that can be read ({type(error).__name__}): delete the folder of the "
            "training, and repeat the command"
        ) from error


def reason_of(error: Exception) -> str:
    """The message of an error, in one line, with its kind where it is not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MiMError) else f"{type(error).__name__}: {text}"


def _total_cost(file: Path) -> dict[str, Any]:
    """Cost of all attempts at a cell: seconds in all, maximum memory in bytes, parameters, device. Empty if unknown."""
    attempts = attempts_of(file)
    if not attempts:
        return {}
    seconds, peak_bytes = ([attempt[name] for attempt in attempts] for name in ("seconds", "peak_bytes"))
    return {**attempts[-1], "seconds": sum(seconds), "peak_bytes": max(peak_bytes)}
