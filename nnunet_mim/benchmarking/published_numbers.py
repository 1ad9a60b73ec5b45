"""Numbers that others have published on the same data, each with its source and what makes it hard to compare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One number of another work."""

    dataset: str
    """part of the dataset's name"""
    method: str
    dice: float
    """%"""
    protocol: str
    source: str
    """second hand: read in another work than the one that measured it, or in an abstract only"""


FOLDS = "five folds of nnU-Net, from random weights"
LITS = f"{FOLDS}; LiTS, the same 131 cases"
PRESETS = "nnU-Net, documentation/resenc_presets.md"
SPLIT = "24/6 split, MONAI's preprocessing"
MONAI = "MONAI tutorials, SwinUNETR pretraining, README"
NUMBERS = (
    Published("BTCV", "nnU-Net", 83.08, FOLDS, PRESETS),
    Published("BTCV", "nnU-Net ResEnc-L", 83.35, FOLDS, PRESETS),
    Published("BTCV", "MedNeXt-L k5", 85.04, FOLDS, PRESETS),
    Published("BTCV", "SwinUNETR in nnU-Net", 78.89, FOLDS, PRESETS),
    Published("BTCV", "SwinUNETR, scratch, 3 labelled", 58.29, SPLIT, MONAI),
    Published("BTCV", "SwinUNETR, pretrained, 3 labelled", 60.47, SPLIT, MONAI),
    Published("BTCV", "SwinUNETR, scratch, 24 labelled", 82.63, SPLIT, MONAI),
    Published("BTCV", "SwinUNETR, pretrained, 24 labelled", 82.64, SPLIT, MONAI),
    Published("BTCV", "SubFore", 84.64, "split and preprocessing not checked", "MICCAI 2025, abstract (second hand)"),
    Published("Liver", "nnU-Net", 80.09, f"{LITS} as MSD's liver task", PRESETS),
    Published("Liver", "nnU-Net ResEnc-L", 81.60, LITS, PRESETS),
    Published("Liver", "MedNeXt-L k5", 82.34, LITS, PRESETS),
)
WARNING = (
    "Not measured here. Preprocessing, split, length of training and test-time augmentation differ from those above "
    "unless the protocol says otherwise: a difference of one or two Dice points means nothing. The ten thousand "
    "volumes that several published encoders were pretrained on hold BTCV's cases."
)


def numbers_for(dataset: str) -> list[Published]:
    """The published numbers on a dataset (DatasetXXX_Name)."""
    return [number for number in NUMBERS if number.dataset.lower() == dataset.partition("_")[2].lower()]


def published_table(dataset: str) -> list[list[str]]:
    """A heading, and one row per published number."""
    rows = [[n.method, f"{n.dice:.2f}", n.protocol, n.source] for n in numbers_for(dataset)]
    return [["method", "Dice %", "protocol", "source"], *rows]
