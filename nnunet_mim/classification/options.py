"""What `mim_classify train` can be told. Its flags are the fields. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nnunet_mim.config import CHECKPOINTS, ENCODERS, PRESETS
from nnunet_mim.errors import MiMError
from nnunet_mim.settings import check_value, setting

MODES = ("probe", "finetune", "scratch")
RANDOM = "none"
"""in place of a checkpoint: random weights"""
LABELS_AS_ROI = "labels"
BALANCES = ("weights", "sampling", "none")
LARGEST_WINDOW = (96, 96, 96)


@dataclass(frozen=True)
class DataOptions:
    """Which preprocessed dataset, and which of its results."""

    dataset: str = setting("", "dataset number or name", "-d", required=True, metavar="DATASET")
    plans: str = setting("nnUNetPlans", "plans identifier", "-p", metavar="PLANS")
    configuration: str = setting("3d_fullres", "configuration of the plans", "-c", metavar="CONFIG")
    target: tuple[str, ...] = setting(
        (), "columns of labels.csv to tell", "--target", "", nargs="+", required=True, type=str, metavar="COLUMN"
    )


@dataclass(frozen=True)
class TrainedOptions(DataOptions):
    """Which trained classifier: in the results of a dataset, or an export."""

    dataset: str = setting("", "dataset number or name", "-d", "", metavar="DATASET")
    target: tuple[str, ...] = setting(
        (), "columns of labels.csv that it tells", "--target", "", nargs="+", type=str, metavar="COLUMN"
    )
    export: str = setting("", "folder of mim_classify export, in place of -d and --target", "-m", "", metavar="FOLDER")

    def __post_init__(self) -> None:
        if bool(self.export) == bool(self.dataset) or bool(self.dataset) != bool(self.target):
            raise MiMError("which classifier? Give -d DATASET and --target COLUMN, or -m FOLDER of mim_classify export")


@dataclass(frozen=True)
class MachineOptions:
    """How a machine trains a network; the result is the same but for rounding."""

    resume: bool = setting(
        False, "continue from the latest checkpoint of each fold; finished folds stay", ("--c", "--continue")
    )
    num_gpus: int | None = setting(
        None,
        "devices of this machine that share a batch",
        "-num_gpus",
        "1, or what torchrun or SLURM has started",
        type=int,
    )
    precision: str | None = setting(
        None,
        "arithmetic of training",
        "--precision",
        "bf16-mixed on cuda, else 32-true",
        choices=["32-true", "bf16-mixed"],
    )
    workers: int | None = setting(
        None, "processes that read crops for each device", "--workers", "as mim_pretrain", type=int
    )


@dataclass(frozen=True)
class ClassifyConfig:
    """Everything that decides what `mim_classify train` computes. Saved in settings.json."""

    mode: str = setting(
        "probe",
        "probe (a logistic regression on features of the frozen encoder), finetune, or scratch (the control of "
        "finetune, from random weights)",
        "--mode",
        choices=MODES,
    )
    encoder: str = setting(
        "hybrid", "hybrid (of nnUNetTrainerMiM) or resenc (nnU-Net's residual encoder)", "--encoder", choices=ENCODERS
    )
    checkpoint: str = setting(
        "",
        f"pretraining: {CHECKPOINTS}; none for random weights; --mode scratch takes its network and leaves its weights",
        "-pc",
        default_text="as nnUNetTrainerMiM takes it",
        metavar="CHECKPOINT",
    )
    preset: str = setting(
        "base", "network size where neither plans nor a checkpoint say it", "--preset", choices=list(PRESETS)
    )
    labels: str = setting("", "table of labels", "--labels", "labels.csv in nnUNet_raw/DatasetXXX", metavar="FILE")
    labelled: str = setting(
        "all",
        "training patients of a fold that have a label: a number, a percentage such as 10%, or all; of one --seed more "
        "patients hold the fewer ones; all cases are predicted",
        "--labelled",
        metavar="N",
    )
    per_patient: bool = setting(
        False, "the targets are properties of patients: refuse different values within one", "--per_patient"
    )
    covariate: tuple[str, ...] = setting(
        (),
        "columns of numbers in the table that are tried alone and added to the network's output",
        "--covariate",
        "none",
        nargs="+",
        type=str,
        metavar="COLUMN",
    )
    roi: str = setting(
        "",
        "what is looked at: labels (a box around the dataset's labels) or a folder of masks, such as predictions of "
        "nnUNetv2_predict",
        "--roi",
        default_text="the whole case, by windows",
        metavar="ROI",
    )
    margin: float = setting(10.0, "millimetres around the mask that belong to the box", "--margin", metavar="MM")
    mask_channel: bool = setting(
        False,
        "the mask is a further input channel of a trained network; its places are pooled by themselves in any case",
        "--mask_channel",
    )
    window: tuple[int, ...] = setting(
        (),
        "maximum number of voxels that the encoder sees at once, one number or three; larger cases and boxes are cut "
        "into windows",
        "--window",
        "96; for a trained network what holds nine of ten boxes, at most 96",
        nargs="+",
        type=int,
        metavar="V",
    )
    epochs: int = setting(20, "passes over the training cases of a network", "--epochs")
    batch: int = setting(16, "cases of a step, over all devices", "--batch")
    lr: float = setting(3e-4, "peak learning rate of AdamW", "--lr")
    layer_decay: float = setting(
        1.0, "learning rate of the encoder's layer at distance d from its end: lr * layer_decay ** d", "--layer_decay"
    )
    balance: str = setting(
        "weights",
        "how rare classes count in training: weights (in the loss), sampling (drawn more often), or none; "
        "probabilities are those of the classes' true shares in any case",
        "--balance",
        choices=BALANCES,
    )
    case_windows: int = setting(
        4, "maximum number of random windows of a case in a step, where it is larger than one", "--case_windows"
    )
    folds: int = setting(5, "number of folds, where no file names them yet", "--folds")
    seed: int = setting(0, "seed of random weights, labelled patients, inner splits and intervals", "--seed")
    tag: str = setting("", "tag in the results folder's name, to keep several trainings", "-o", "none", metavar="TAG")

    def __post_init__(self) -> None:
        window = self.window * 3 if len(self.window) == 1 else self.window
        if not window and self.mode == "probe":
            window = LARGEST_WINDOW
        object.__setattr__(self, "window", window)
        if window and (len(window) != 3 or min(window) < 1):
            raise MiMError(f"--window takes one number above 0 or three (the plans' order of axes), got {self.window}")
        if self.folds < 2:
            raise MiMError(f"--folds must be at least 2, got {self.folds}")
        if not 0 <= self.margin < math.inf:
            raise MiMError(f"--margin must be 0 mm or more, got {self.margin}")
        if self.seed < 0:
            raise MiMError(f"--seed must be 0 or more, got {self.seed}")
        if not re.fullmatch(r"all|[1-9][0-9]*%?", self.labelled):
            raise MiMError(f"--labelled takes a number above 0, a percentage such as 10%, or all, got {self.labelled}")
        if not re.fullmatch(r"[\w.-]*", self.tag):
            raise MiMError(f"-o {self.tag}: a tag takes letters, digits, '_', '.' and '-'")
        if self.mask_channel and not self.roi:
            raise MiMError("--mask_channel needs a mask: add --roi labels, or --roi FOLDER")
        if self.mask_channel and self.mode == "probe":
            raise MiMError("--mask_channel is for trained networks: leave it out, a probe uses the mask anyway")
        for name in ("epochs", "batch", "case_windows"):
            if getattr(self, name) < 1:
                raise MiMError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf or not 0 < self.layer_decay <= 1:
            raise MiMError(f"--lr must be above 0, --layer_decay too and at most 1, got {self.lr}, {self.layer_decay}")

    @property
    def from_random(self) -> bool:
        """Whether the weights are random at the start."""
        return self.mode == "scratch" or self.checkpoint == RANDOM

    @property
    def arm(self) -> str:
        """Name of the results folder: the mode, and what differs from the usual."""
        parts = [self.mode]
        parts += ["random"] if self.from_random and self.mode != "scratch" else []
        parts += [self.encoder] if self.encoder != "hybrid" else []
        if self.labelled != "all":
            parts.append(self._of_labels)
        elif self.seed and self.mode != "probe":
            parts.append(f"seed{self.seed}")
        parts += [self.tag] if self.tag else []
        return "_".join(parts)

    def baseline_arm(self, name: str) -> str:
        """Name of the results folder of a baseline."""
        return name if self.labelled == "all" else f"{name}_{self._of_labels}"

    @property
    def _of_labels(self) -> str:
        seed = f"_seed{self.seed}" if self.seed else ""
        return f"labelled{self.labelled.replace('%', 'pct')}{seed}"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ClassifyConfig:
        """Inverse of `to_dict`. Raises TypeError for an unknown setting, MiMError for one of another kind."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        for entry in fields(cls):
            like = ("a column",) if entry.name == "covariate" else entry.default
            check_value(entry.name, values.get(entry.name, entry.default), like)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
