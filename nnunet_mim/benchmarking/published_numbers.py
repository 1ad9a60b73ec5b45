"""Numbers that others have published on the same data, each with its source and what makes it hard to compare."""

from __future__ import annotations

FOLDS = "five folds of nnU-Net, from random weights"
LITS = f"{FOLDS}; LiTS, the same 131 cases"
PRESETS = "nnU-Net, documentation/resenc_presets.md"
SPLIT = "24/6 split, MONAI's preprocessing"
MONAI = "MONAI tutorials, SwinUNETR pretraining, README"
NUMBERS = {
    "btcv": [
        ["nnU-Net", "83.08", FOLDS, PRESETS],
        ["nnU-Net ResEnc-L", "83.35", FOLDS, PRESETS],
        ["MedNeXt-L k5", "85.04", FOLDS, PRESETS],
        ["SwinUNETR in nnU-Net", "78.89", FOLDS, PRESETS],
        ["SwinUNETR, scratch, 3 labelled", "58.29", SPLIT, MONAI],
        ["SwinUNETR, pretrained, 3 labelled", "60.47", SPLIT, MONAI],
        ["SwinUNETR, scratch, 24 labelled", "82.63", SPLIT, MONAI],
        ["SwinUNETR, pretrained, 24 labelled", "82.64", SPLIT, MONAI],
        ["SubFore", "84.64", "split and preprocessing not checked", "MICCAI 2025, abstract (second hand)"],
    ],
    "liver": [
        ["nnU-Net", "80.09", f"{LITS} as MSD's liver task", PRESETS],
        ["nnU-Net ResEnc-L", "81.60", LITS, PRESETS],
        ["MedNeXt-L k5", "82.34", LITS, PRESETS],
    ],
}
"""Method, Dice (%), protocol and source by the dataset's name in lower case. Second hand: read in another work than the
one that measured it, or in an abstract only."""
WARNING = (
    "Not measured here. Preprocessing, split, length of training and test-time augmentation differ from those above "
    "unless the protocol says otherwise: a difference of one or two Dice points means nothing. The ten thousand "
    "volumes that several published encoders were pretrained on hold BTCV's cases."
)


def published_table(dataset: str) -> list[list[str]]:
    """A heading and a row per published number on a dataset (DatasetXXX_Name); empty where there is none."""
    rows = NUMBERS.get(dataset.partition("_")[2].lower(), [])
    return [["method", "Dice %", "protocol", "source"], *rows] if rows else []
