"""External test sets: labelled cases of another dataset, which every finished training predicts and is scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import SimpleITK as sitk
from nnunetv2.paths import nnUNet_raw

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import dataset_name, raw_files, raw_images
from nnunet_mim.nnunet.documents import read_dataset_json
from nnunet_mim.nnunet.image_files import READ_SECONDS, damaged, file_problem
from nnunet_mim.nnunet.labels import declared_values, geometry_differences, whole_numbers
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory, usable_cores
from nnunet_mim.system.progress import ProgressBar

SAME_IN_BOTH = ("labels", "channel_names", "file_ending")
"""entries of dataset.json that a network can only be tested with where they agree"""
MOST_PROCESSES = 8
"""references that are read at once"""


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


def check_references(test: ExternalSet) -> None:
    """Refuse references that labels for training could not be: of another size than their image, with values that
    dataset.json does not declare or that are no whole numbers, or damaged. Guarded workers read several at once.

    Raises MiMError that names the first case.
    """
    file = Path(str(nnUNet_raw), test.dataset, "dataset.json")
    check = partial(_reference_problem, frozenset(declared_values(read_dataset_json(file), file)))
    cases, cores = sorted(test.references), min(MOST_PROCESSES, usable_cores())
    items = [(test.references[case], test.images[case][0]) for case in cases]
    limits, problems = Limits(READ_SECONDS, share_of_memory(physical_memory(), cores)), {}
    with closing(guarded_map(check, items, cores, limits)) as outcomes:
        bar = ProgressBar(outcomes, desc=f"references of {test.dataset}", total=len(items), unit="case")
        for index, outcome in bar:
            if isinstance(outcome, Failure):
                problems[index] = f"label cannot be read ({outcome.reason}): {items[index][0]}"
            elif outcome:
                problems[index] = outcome
    if problems:
        first, more = min(problems), f" (one of {len(problems)} cases)" if len(problems) > 1 else ""
        remedy = "correct the label, or move the case out of the dataset"
        raise MiMError(f"test: {test.dataset} {cases[first]}: {problems[first]}{more}: {remedy}")


def _reference_problem(values: frozenset[int], item: tuple[Path, Path]) -> str:
    """Why a reference (the first file of `item`) is no label of its image; empty where it is one. May crash or hang."""
    label, image = item
    for file in item:
        if problem := file_problem(str(file)) or (damaged(file) if file == label else None):
            return f"{problem}: {file}"
    differences = geometry_differences(label, image)
    if "size" in differences:
        return f"label {differences['size']}: {label}"
    found = whole_numbers(sitk.GetArrayFromImage(sitk.ReadImage(str(label))), values)
    return f"{found}: {label}" if isinstance(found, str) else ""


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
