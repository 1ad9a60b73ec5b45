"""External test sets: labelled cases of another dataset, which every finished training predicts and is scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_raw

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import dataset_name, raw_files, raw_images
from nnunet_mim.nnunet.documents import read_dataset_json

SAME_IN_BOTH = ("labels", "channel_names", "file_ending")
"""entries of dataset.json that a network can only be tested with where they agree"""


@dataclass(frozen=True)
class ExternalSet:
    """The labelled cases of a dataset in nnUNet_raw, by name."""

    dataset: str
    """DatasetXXX_Name"""
    images: Mapping[str, tuple[Path, ...]]
    """one file per channel"""
    references: Mapping[str, Path]
    """label images"""


def find_external(given: str, trained: Mapping[str, Mapping[str, Any]]) -> ExternalSet:
    """The test set of a number or name, for networks that are trained on the datasets in `trained` (dataset.json by
    name).

    Raises:
        MiMError: it is not in nnUNet_raw, has no cases, a label image is missing, its labels, channels or file ending
            are others, it is trained on, or one of its images is an image of a dataset that is trained on.
    """
    name = dataset_name(given)
    folder = Path(str(nnUNet_raw), name)
    if name in trained:
        raise MiMError(f"test: {name} is trained on: give a dataset that is not among 'datasets'")
    if not (folder / "dataset.json").is_file():
        raise MiMError(f"test: {folder} has no dataset.json: copy the raw dataset there")
    description = read_dataset_json(folder / "dataset.json")
    for other, content in trained.items():
        for entry in SAME_IN_BOTH:
            if (ours := description.get(entry)) != (theirs := content.get(entry)):
                remedy = "give a dataset with the same labels, channels and file ending"
                raise MiMError(f"test: {entry} of {name} is {ours}, that of {other} {theirs}: {remedy}")
    files = raw_files(folder, description)
    if not files:
        raise MiMError(f"test: {folder} has no training cases: copy images and labels there")
    references = {case: Path(entry["label"]) for case, entry in sorted(files.items())}
    if missing := [path for path in references.values() if not path.is_file()]:
        raise MiMError(f"test: the label image {missing[0]} is missing: copy it there, or take the image away")
    images = {case: tuple(map(Path, entry["images"])) for case, entry in sorted(files.items())}
    _refuse_copies(name, images, trained)
    return ExternalSet(name, images, references)


def _refuse_copies(name: str, images: Mapping[str, tuple[Path, ...]], trained: Iterable[str]) -> None:
    """MiMError where an image file is, byte by byte, one of a dataset that is trained on."""
    sizes: dict[int, list[tuple[str, Path]]] = {}
    for other in trained:
        for case, files in raw_images(other).items():
            path = Path(files[0])
            if path.is_file():
                sizes.setdefault(path.stat().st_size, []).append((f"{other} {case}", path))
    for case, (first, *_) in images.items():
        for other, path in sizes.get(first.stat().st_size, []):
            if _sha256(first) == _sha256(path):
                raise MiMError(f"test: {name} {case} is the same image as {other}: take it out of one of them")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link_images(external: ExternalSet, folder: Path) -> None:
    """Make a folder with links to the images and nothing else, named as nnU-Net's prediction takes them.

    Raises OSError where links cannot be made.
    """
    folder.mkdir(parents=True)
    for case, files in external.images.items():
        for channel, path in enumerate(files):
            suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".nii.gz") else path.suffix
            (folder / f"{case}_{channel:04d}{suffix}").symlink_to(path.resolve())
