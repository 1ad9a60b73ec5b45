"""nnU-Net's folders, and the names and raw files of the datasets in them.

Nothing here forks, as nnU-Net's own function does: the child of a process with threads can wait for ever for a lock.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.utils import (
    create_paths_fn,
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_dataset_json


def require_environment() -> None:
    """Raise MiMError unless nnUNet_preprocessed and nnUNet_results are set."""
    required_folder("nnUNet_preprocessed")
    required_folder("nnUNet_results")


def required_folder(variable: str) -> str:
    """Value of one of nnU-Net's environment variables. Raises MiMError where it is not set."""
    folder = os.environ.get(variable)
    if not folder:
        raise MiMError(f"environment variable {variable} is not set: export {variable}=FOLDER (nnU-Net's own variable)")
    return folder


def dataset_name(given: str) -> str:
    """Name of a dataset in nnUNet_raw or nnUNet_preprocessed, from its number (`501`) or name (`Dataset501_Name`).

    Raises MiMError for no such dataset, or several with this number.
    """
    roots = [Path(str(root)) for root in (nnUNet_raw, nnUNet_preprocessed) if root.is_set()]
    names = sorted({path.name for root in roots for path in root.glob("Dataset[0-9][0-9][0-9]_*") if path.is_dir()})
    found = [name for name in names if name == given or (given.isdigit() and int(name[7:10]) == int(given))]
    if len(found) > 1:
        raise MiMError(f"dataset number {given} is ambiguous ({', '.join(found)}): give the whole name")
    if not found:
        raise MiMError(
            f"unknown dataset '{given}': not in nnUNet_raw or nnUNet_preprocessed ({', '.join(map(str, roots))}), "
            f"which hold {', '.join(names) or 'none'}"
        )
    return found[0]


def dataset_names(given: Sequence[str]) -> list[str]:
    """Names of several datasets as of `dataset_name`. Raises MiMError for one that is given twice, too."""
    names = [dataset_name(one) for one in given]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise MiMError(f"-d {' '.join(given)}: {name} is there twice, leave out {given[position]}")
    return names


def raw_files(raw: Path, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """For every training case of a folder in nnUNet_raw its "images", one file per channel, and its "label".

    The result is that of nnU-Net's `get_filenames_of_train_images_and_targets`. Raises MiMError without imagesTr.
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
    """Image files of every training case in nnUNet_raw; empty where the dataset or its images are missing.

    Raises MiMError as `read_dataset_json`.
    """
    folder = Path(str(nnUNet_raw), dataset) if nnUNet_raw.is_set() else None
    if folder is None or not (folder / "dataset.json").is_file():
        return {}
    dataset_json = read_dataset_json(folder / "dataset.json")
    if "dataset" not in dataset_json and not (folder / "imagesTr").is_dir():
        return {}
    return {case: entry["images"] for case, entry in raw_files(folder, dataset_json).items()}
