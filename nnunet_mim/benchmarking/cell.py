"""What one training of an experiment is: an arm, found and checked before any training, its cases, seed and length."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from typing import Any

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_mim.benchmarking.bench_file import TRAIN, ArmSpec
from nnunet_mim.benchmarking.seeded_training import Length, installed_command
from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.checkpoint.locate import WEIGHTS, find_checkpoint, locate, no_checkpoint_error
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_dataset_json
from nnunet_mim.nnunet.plans import configuration_of, uses_hybrid_unet
from nnunet_mim.nnunet.source import Source, find_source
from nnunet_mim.trainers.finetune_config import PLANS_KEY, FinetuneConfig
from nnunet_mim.trainers.transfer import check_architecture


@dataclass(frozen=True)
class Arm:
    """An arm on one dataset and fold, with its data and its checkpoint."""

    spec: ArmSpec
    source: Source = field(repr=False)
    """the dataset as preprocessed for the plans"""
    checkpoint: str | None = None

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """Hashes of the plans and of the checkpoint."""
        plans = {k: v for k, v in self.source.plans.items() if k not in (PLANS_KEY, "pretrain_info")}
        # with the defaults of what the plans leave open: these may change with a new version of the package
        recipe = FinetuneConfig().to_dict() | self.source.plans.get(PLANS_KEY, {}) if self.spec.is_mim else {}
        text = json.dumps([plans, recipe], sort_keys=True)
        return {
            "plans_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "checkpoint_sha256": checkpoint_sha256(Path(self.checkpoint)) if self.checkpoint else None,
        }


@dataclass(frozen=True)
class Cell:
    """One training of the experiment."""

    arm: Arm
    fold: int
    train_cases: tuple[str, ...]
    val_cases: tuple[str, ...]
    seed: int
    length: Length

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        """nnU-Net's dataset.json of the preprocessed dataset."""
        return read_dataset_json(self.arm.source.folder.parent / "dataset.json")

    def reference(self, case: str) -> Path:
        """nnU-Net's copy of a case's label image."""
        return self.arm.source.folder.parent / "gt_segmentations" / f"{case}{self.dataset_json['file_ending']}"

    def recipe(self) -> FinetuneConfig:
        """The plans' recipe with the length and settings of the experiment. MiMError where a setting is bad."""
        length = {
            "num_epochs": self.length.epochs,
            "iterations_per_epoch": self.length.iterations,
            "val_iterations_per_epoch": self.length.val_iterations,
        }
        of_plans = self.arm.source.plans.get(PLANS_KEY, {})
        return FinetuneConfig.from_plans({PLANS_KEY: {**of_plans, **self.arm.spec.settings, **length}})

    def key(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        return {
            "dataset": self.arm.source.dataset,
            "plans": self.arm.source.plans_name,
            "configuration": self.arm.source.configuration,
            "trainer": self.arm.spec.trainer,
            "command": self.arm.spec.command,
            "checkpoint": self.arm.checkpoint,
            "fold": self.fold,
            "train_cases": list(self.train_cases),
            "val_cases": list(self.val_cases),
            "seed": self.seed,
            "length": asdict(self.length),
            "settings": dict(self.arm.spec.settings),
            **self.arm.identity,
        }


def checkpoint_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint file, or of the weights in a folder of `mim_export`."""
    return hashlib.sha256((path / WEIGHTS if path.is_dir() else path).read_bytes()).hexdigest()


def resolve_arm(spec: ArmSpec, dataset: str, configuration: str, fold: int) -> Arm:
    """Find an arm's data and checkpoint for one dataset and fold.

    Raises MiMError with the arm's name where it is not preprocessed, has no checkpoint or one that does not fit, or its
    network would follow from the checkpoint, so that the control had another one.
    """
    try:
        return _resolve(spec, dataset, configuration, fold)
    except MiMError as error:
        raise MiMError(f"arm {spec.name}: {error}") from error


def _resolve(spec: ArmSpec, dataset: str, configuration: str, fold: int) -> Arm:
    source = find_source(dataset, spec.plans, configuration, ("the arm's plans", "the dataset's configuration"))
    if (inner := source.plans.get("plans_name")) != source.plans_name:
        raise MiMError(f"the plans file {source.plans_name}.json calls its plans {inner}: let both be the same")
    config = configuration_of(source.plans, source.configuration)
    if not _is_trainer(spec.trainer):
        raise MiMError(f"nnU-Net knows no trainer {spec.trainer}: correct its name")
    given = None
    if spec.checkpoint:
        given = spec.checkpoint.replace("{fold}", str(fold)).replace("{dataset}", source.dataset)
        if {*"{}"} & {*given}:
            raise MiMError(f"checkpoint {spec.checkpoint}: only {{fold}} and {{dataset}} may be in braces")
    if not spec.is_mim:
        return Arm(spec, source, _stock_checkpoint(spec, source, given))
    if not uses_hybrid_unet(config):
        remedy = f"write plans with mim_plan -d {source.dataset[7:10]} -pc CHECKPOINT, and give their name"
        raise MiMError(f"plans {source.plans_name} name another network than that of {spec.trainer}: {remedy}")
    if spec.is_control:
        if given:
            raise MiMError(f"{spec.trainer} starts from random weights: leave the checkpoint out")
        return Arm(spec, source)
    if given is None:
        where = (source.plans, source.configuration, fold, os.environ["nnUNet_results"])
        found = find_checkpoint(*where)
        if found is None:
            raise no_checkpoint_error(*where, "give the arm a checkpoint, or the trainer nnUNetTrainerMiMScratch")
        given = str(found)
    stored = PretrainedCheckpoint.load(given)
    check_architecture(stored, config["architecture"]["arch_kwargs"], source.in_channels)
    return Arm(spec, source, str(locate(given)))


def _stock_checkpoint(spec: ArmSpec, source: Source, given: str | None) -> str | None:
    """The checkpoint of a trainer that is not this package's: the given one; for nnUNetv2_train_pretrained that of the
    plans.
    """
    if spec.command != TRAIN:
        if installed_command(spec.command) is None:
            raise MiMError(f"{spec.command} is not installed: install an nnU-Net that has it (see nnU-Net's page)")
        given = (source.plans.get("pretrain_info") or {}).get("checkpoint_path")
    path = locate(given) if given else None
    if path is not None and path.is_dir():
        raise MiMError(f"{spec.trainer} takes a .pth file, not the folder {path}")
    return str(path) if path else None


@cache
def _is_trainer(name: str) -> bool:
    """Whether nnU-Net finds a trainer of this name."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():  # nnU-Net says where it looks
        warnings.simplefilter("ignore")
        try:
            recursive_find_trainer_class_by_name(name)
        except RuntimeError:
            return False
    return True


def control_of(specs: Sequence[ArmSpec], given: str | None = None) -> str:
    """Name of the arm that others are compared with: the given one, else the first control of this package, else the
    first arm without a checkpoint, else the last one. MiMError where no arm has the given name.
    """
    names = [spec.name for spec in specs]
    if given is not None:
        if given not in names:
            raise MiMError(f"control {given} is none of the arms: {', '.join(names)}")
        return given
    controls = [spec.name for spec in specs if spec.is_control]
    stock = [spec.name for spec in specs if not (spec.checkpoint or spec.nnssl_plans or spec.is_mim)]
    return (controls + stock + names[-1:])[0]
