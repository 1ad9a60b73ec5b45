"""What one training of an experiment is: an arm, its cases, seed and length."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_mim.benchmarking.bench_file import ArmSpec
from nnunet_mim.benchmarking.seeded_training import Length
from nnunet_mim.checkpoint.locate import WEIGHTS
from nnunet_mim.nnunet.source import Source
from nnunet_mim.trainers.finetune_config import PLANS_KEY, FinetuneConfig


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
        return json.loads((self.arm.source.folder.parent / "dataset.json").read_text())

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
