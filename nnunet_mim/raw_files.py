"""The files of a dataset in nnUNet_raw.

nnU-Net's own function forks a pool of twelve processes to sort file names. A forked child of a process that has threads
(torch, OpenMP, a progress bar) can wait for ever for a lock that one of them held, so nothing here makes processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.utils import (
    create_paths_fn,
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunet_mim.errors import MiMError


def raw_files(raw: Path, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """What nnU-Net's `get_filenames_of_train_images_and_targets` returns, without a pool of processes.

    Args:
        raw: the dataset's folder.
        dataset_json: its content; not changed.

    Returns:
        for every training case its "images", one file for each channel, and its "label".

    Raises:
        MiMError: there is no imagesTr.
    """
    if "dataset" in dataset_json:
        return get_filenames_of_train_images_and_targets(str(raw), deepcopy(dict(dataset_json)))
    images, ending = str(raw / "imagesTr"), dataset_json["file_ending"]
    if not os.path.isdir(images):
        raise MiMError(f"{images} does not exist: see nnU-Net's page on its dataset format")
    files = sorted(name for name in os.listdir(images) if name.endswith(ending))
    return {
        str(case): {
            "images": create_paths_fn(images, files, ending, str(case)),
            "label": str(raw / "labelsTr" / f"{case}{ending}"),
        }
        for case in get_identifiers_from_splitted_dataset_folder(images, ending)
    }


def raw_images(dataset: str) -> dict[str, list[str]]:
    """The image files of every training case in nnUNet_raw; empty where the dataset or its images are not there."""
    folder = Path(str(nnUNet_raw), dataset) if nnUNet_raw.is_set() else None
    if folder is None or not (folder / "dataset.json").is_file():
        return {}
    dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    if "dataset" not in dataset_json and not (folder / "imagesTr").is_dir():
        return {}
    return {case: entry["images"] for case, entry in raw_files(folder, dataset_json).items()}
