"""The cases of a dataset in nnUNet_raw, as far as its dataset.json and the names of its files tell."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import raw_files
from nnunet_mim.nnunet.documents import read_dataset_json
from nnunet_mim.nnunet.labels import declared_values
from nnunet_mim.nnunet.plans import n_channels
from nnunet_mim.preparation.prepare_case import RawCase


@dataclass(frozen=True)
class RawDataset:
    """A dataset in nnUNet_raw. No image has been opened."""

    description: dict[str, Any]
    """content of dataset.json"""
    files: dict[str, Any]
    """"images" and "label" of every case, by name"""
    cases: list[RawCase]
    """sorted by name"""
    label_values: tuple[int, ...]
    """that may occur in labels; empty for a dataset without"""


def read_raw_dataset(raw: Path, base: Path) -> RawDataset:
    """Read and check the dataset in the folder `raw` of nnUNet_raw; `base` is its folder in nnUNet_preprocessed.

    Raises MiMError for no raw data, a dataset.json that nnU-Net would not take or that states
    another number of cases, or files of a case that are missing.
    """
    file = raw / "dataset.json"
    if not file.is_file():
        raise MiMError(f"{file} does not exist: give the number of a dataset in nnUNet_raw, or -i FOLDER")
    description = read_dataset_json(file)
    if "numTraining" not in description:
        raise MiMError(f"{file} has no numTraining: see nnU-Net's page on its dataset format")
    files = raw_files(raw, description)
    if not files:
        raise MiMError(f"no image in {raw}: see nnU-Net's page on its dataset format")
    n, stated = len(files), description["numTraining"]
    if stated != n:  # nnU-Net plans with it, and its own check of a dataset refuses this too
        raise MiMError(f"{file} states {stated} cases, {n} are there: write numTraining {n}, or bring back the rest")
    _check_channels(file, n_channels(description), files)
    labelled = _has_labels(files, base)
    cases = [
        RawCase(str(name), tuple(map(str, entry["images"])), str(entry["label"]) if labelled else None)
        for name, entry in sorted(files.items())
    ]
    return RawDataset(description, files, cases, tuple(declared_values(description, file)) if labelled else ())


def unlabelled_dataset(images: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """nnU-Net's dataset.json of CT without labels; its label files are named, but need not exist.

    Without any image it has no `numTraining`: it is a file of mim_prepare that holds a place.
    """
    return {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0},
        **({"numTraining": len(images)} if images else {}),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIOWithReorient",
        "made_by": "mim_prepare",
        "dataset": {
            name: {"images": list(files), "label": f"labelsTr/{name}.nii.gz"} for name, files in sorted(images.items())
        },
    }


def _check_channels(file: Path, channels: int, files: Mapping[str, Any]) -> None:
    """Raise MiMError unless every case has one image for each channel of dataset.json, which is `file`."""
    for name, entry in files.items():
        if len(entry["images"]) != channels:
            shown = ", ".join(Path(image).name for image in entry["images"])
            raise MiMError(
                f"case {name} of {file.parent} has {len(entry['images'])} images ({shown}), {file} names {channels} "
                "channels: add what is missing, or move the other files of the case away"
            )


def _has_labels(files: Mapping[str, Any], base: Path) -> bool:
    """Whether the cases have labels. Raises MiMError where only some have, or none any more.

    Cases whose images are missing too do not count: their disk may be away.
    """
    there = [entry for entry in files.values() if all(map(os.path.isfile, entry["images"]))]
    missing = [entry["label"] for entry in there if not os.path.isfile(entry["label"])]
    if len(missing) < len(there) and missing:
        raise MiMError(f"{missing[0]} is missing, others are there: add it, or move its image away")
    references = base / "gt_segmentations"
    if missing and references.is_dir() and any(references.iterdir()):
        raise MiMError(
            f"{missing[0]} is missing, and so are all labels that {base.name} was prepared with: bring them back, or "
            f"delete {references} to prepare images alone"
        )
    return any(os.path.isfile(entry["label"]) for entry in files.values())
