"""From a checked archive to a dataset in nnUNet_raw, which is written completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunet_mim.benchmarking.archives import ENDING, Archive
from nnunet_mim.errors import MiMError, last_line
from nnunet_mim.nnunet.labels import geometry_differences, write_like_image
from nnunet_mim.preparation.prepare_case import remove_abandoned
from nnunet_mim.system.progress import ProgressBar


def already_there(archive: Archive, raw: Path) -> bool:
    """Whether the dataset is in nnUNet_raw. Raises MiMError where it has other cases, or another one has its number."""
    number = archive.dataset[7:10]
    if others := [str(name) for name in find_candidate_datasets(int(number)) if name != archive.dataset]:
        remedy = "give another number with --btcv_id" if archive.is_btcv else "move it away"
        raise MiMError(f"dataset number {number} is taken by {others[0]}, {archive.dataset} cannot be made: {remedy}")
    folder = raw / archive.dataset
    if not folder.exists():
        return False
    names = {path.name.removesuffix(ENDING) for path in (folder / "labelsTr").glob(f"*{ENDING}")}
    if names != {case.name for case in archive.cases} or not (folder / "dataset.json").is_file():
        counts = f"{len(names)} cases, not the {len(archive.cases)} of {archive.folder}"
        raise MiMError(f"{folder} is there already with {counts}: move it away to have it made anew")
    return True


def check_space(archives: Sequence[Archive], raw: Path) -> None:
    """MiMError if nnUNet_raw does not exist or has no space for these archives."""
    if not raw.is_dir():
        raise MiMError(f"nnUNet_raw is {raw}, which is not a folder: make it, or set the variable to the right one")
    copied = [path for archive in archives if not _linkable(archive, raw) for path, _ in _pairs(archive, raw)]
    needed, free = sum(path.stat().st_size for path in copied) / 1e9, shutil.disk_usage(raw).free / 1e9
    if needed > free:
        sizes = f"{free:.1f} GB free, {needed:.1f} GB are needed"
        raise MiMError(f"{raw} has {sizes}: make space, or convert fewer at once")


def make_dataset(archive: Archive, raw: Path) -> None:
    """Make nnUNet_raw/DatasetXXX_Name of a checked archive, in a folder beside it until it is complete.

    Only one process at a time may make the same one. Raises MiMError where it fails; nothing is left then.
    """
    partial = raw / f".mim_benchmark_{archive.dataset}-{os.getpid()}"
    remove_abandoned(partial)
    made = partial / archive.dataset
    try:
        partial.mkdir()
        _link_all(archive, made)
        _lay_on_images(archive, made)
        os.rename(made, raw / archive.dataset)
    except OSError as error:
        where = error.filename or partial
        raise MiMError(f"cannot write {where} ({error.strerror}): make it writable, or make space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pairs(archive: Archive, made: Path) -> list[tuple[Path, Path]]:
    """(file of the archive, file of the dataset) for every image and label."""
    images = [(case.image, made / "imagesTr" / f"{case.name}_0000{ENDING}") for case in archive.cases]
    labels = [(case.label, made / "labelsTr" / f"{case.name}{ENDING}") for case in archive.cases]
    tests = [path.name.removesuffix(ENDING) for path in archive.unlabelled]
    unlabelled = [made / "imagesTs" / f"{name}_0000{ENDING}" for name in tests]
    return images + labels + list(zip(archive.unlabelled, unlabelled, strict=True))


def _link_all(archive: Archive, made: Path) -> None:
    """Link images and labels (hard links), or copy them where that is impossible, and describe the dataset."""
    for folder in {target.parent for _, target in _pairs(archive, made)}:
        folder.mkdir(parents=True)
    for source, target in ProgressBar(_pairs(archive, made), desc=f"converting {archive.folder.name}", unit="file"):
        _link_or_copy(source, target)
    counts = {"numTraining": len(archive.cases), "numTest": len(archive.unlabelled), "file_ending": ENDING}
    description = {**archive.about, "labels": archive.labels, "channel_names": {"0": "CT"}, **counts}
    (made / "dataset.json").write_text(json.dumps(description, indent=4))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _lay_on_images(archive: Archive, made: Path) -> None:
    """Give each label the geometry of its image, where --ignore_origin let it have another one."""
    for case in archive.cases:
        if geometry_differences(case.label, case.image):
            image, label = made / "imagesTr" / f"{case.name}_0000{ENDING}", made / "labelsTr" / f"{case.name}{ENDING}"
            try:
                write_like_image(label, image, label)
            except RuntimeError as error:  # SimpleITK's
                raise MiMError(f"cannot write {label} ({last_line(error)}): make space") from error


def _linkable(archive: Archive, raw: Path) -> bool:
    """Whether its files need no space, being linked."""
    return archive.folder.stat().st_dev == raw.stat().st_dev
