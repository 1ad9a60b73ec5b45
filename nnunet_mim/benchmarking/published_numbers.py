"""Numbers that others have published on the same data, each with its source and what makes it hard to compare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One number of somebody else's."""

    dataset: str
    """part of the dataset's name"""
    method: str
    dice: float
    """%"""
    protocol: str
    source: str
    second_hand: bool = False
    """read in another work than that which measured it, or in an abstract only"""


CROSS_VALIDATION = "five folds of nnU-Net, from random weights"
PRESETS = "nnU-Net, documentation/resenc_presets.md"
MONAI = "MONAI tutorials, SwinUNETR pretraining, README"
NUMBERS = (
    Published("BTCV", "nnU-Net", 83.08, CROSS_VALIDATION, PRESETS),
    Published("BTCV", "nnU-Net ResEnc-L", 83.35, CROSS_VALIDATION, PRESETS),
    Published("BTCV", "MedNeXt-L k5", 85.04, CROSS_VALIDATION, PRESETS),
    Published("BTCV", "SwinUNETR in nnU-Net", 78.89, CROSS_VALIDATION, PRESETS),
    Published("BTCV", "SwinUNETR, scratch, 3 labelled", 58.29, "24/6 split, MONAI's preprocessing", MONAI),
    Published("BTCV", "SwinUNETR, pretrained, 3 labelled", 60.47, "24/6 split, MONAI's preprocessing", MONAI),
    Published("BTCV", "SwinUNETR, scratch, 24 labelled", 82.63, "24/6 split, MONAI's preprocessing", MONAI),
    Published("BTCV", "SwinUNETR, pretrained, 24 labelled", 82.64, "24/6 split, MONAI's preprocessing", MONAI),
    Published("BTCV", "SubFore", 84.64, "split and preprocessing not checked", "MICCAI 2025, abstract", True),
    Published("Liver", "nnU-Net", 80.09, f"{CROSS_VALIDATION}; LiTS, the same 131 cases as MSD's liver task", PRESETS),
    Published("Liver", "nnU-Net ResEnc-L", 81.60, f"{CROSS_VALIDATION}; LiTS, the same 131 cases", PRESETS),
    Published("Liver", "MedNeXt-L k5", 82.34, f"{CROSS_VALIDATION}; LiTS, the same 131 cases", PRESETS),
)
WARNING = (
    "Not measured here. Preprocessing, split, length of training and test-time augmentation differ from those above "
    "unless the protocol says otherwise: a difference of one or two Dice points means nothing. The ten thousand "
    "volumes that several published encoders were pretrained on hold BTCV's cases."
)


def numbers_for(dataset: str) -> list[Published]:
    """Those on a dataset (DatasetXXX_Name); most have none."""
    return [number for number in NUMBERS if number.dataset.lower() == dataset.partition("_")[2].lower()]


def published_table(dataset: str) -> list[list[str]]:
    """Heading and a row a number."""
    rows = [
        [n.method, f"{n.dice:.2f}", n.protocol, n.source + (" (second hand)" if n.second_hand else "")]
        for n in numbers_for(dataset)
    ]
    return [["method", "Dice %", "protocol", "source"], *rows]
