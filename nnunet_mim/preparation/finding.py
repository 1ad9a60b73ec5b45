"""Image files and DICOM series in a user's folders, nested at any depth."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import SimpleITK as sitk

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.image_files import ENDINGS, case_name


@dataclass(frozen=True)
class Volume:
    """One image as it lies in the user's folders, not read yet."""

    name: str
    """name of the case: letters, digits, - and _"""
    files: tuple[str, ...]
    """absolute paths: one image file, or the slices of a DICOM series in their order"""
    series: str = ""
    """SeriesInstanceUID; empty for an image file"""
    unreadable: bool = False
    """whether the files look like DICOM but cannot be read or hold no image"""


def find_volumes(folders: Sequence[Path], earlier_names: dict[str, str] | None = None) -> list[Volume]:
    """All image files and DICOM series in folders, sorted by name.

    Folders are searched to any depth, links included, hidden files left out. A name is the path below the folder in
    letters, digits, - and _; a second one of the same name gets a number. Names from earlier calls, given by the first
    file of the volume, are kept.
    """
    earlier_names = earlier_names or {}
    taken = set(earlier_names.values())
    volumes = []
    for folder in folders:
        if not folder.is_dir():
            raise MiMError(f"-i {folder} is not a folder: give folders with CT (NIfTI, NRRD, MHA, DICOM)")
        for stem, found in _found(folder.resolve()):
            name = earlier_names.get(found.files[0]) or _new_name(stem, taken)
            taken.add(name)
            volumes.append(replace(found, name=name))
    if not volumes:
        raise MiMError(f"no image in {', '.join(map(str, folders))}: give folders with NIfTI, NRRD, MHA or DICOM files")
    unique = {volume.files: volume for volume in reversed(volumes)}  # a folder inside another one of -i
    return sorted(unique.values(), key=lambda volume: volume.name)


def voxel_files(image: str) -> list[str]:
    """Files with the voxels of a header file (`.mhd`, `.nhdr`); none for any other image file."""
    path = Path(image)
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    return sorted(str(p) for p in path.parent.glob(f"{glob.escape(path.stem)}.*raw*"))


def _found(root: Path) -> Iterator[tuple[str, Volume]]:
    """(path below the root, volume without a name) of every volume, sorted by folder."""

    def stop(error: OSError) -> None:
        raise MiMError(f"cannot look into {error.filename} ({error.strerror}): make it readable, or move it away")

    visited = set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=stop):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (real := os.path.realpath(folder)) in visited:
            below[:] = []
            continue
        visited.add(real)
        relative = Path(folder).relative_to(root)
        dicom = []
        for file in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, file)
            if file.lower().endswith(ENDINGS):
                yield (relative / case_name(path)).as_posix(), Volume("", (str(path),))
            elif _is_dicom(path):
                dicom.append(str(path))
        if dicom:
            yield from _series(Path(folder), relative.as_posix() if relative.parts else root.name, dicom)


def _is_dicom(path: Path) -> bool:
    if path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() in (".dcm", ".ima", ".dicom"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _series(folder: Path, stem: str, dicom: list[str]) -> Iterator[tuple[str, Volume]]:
    """The DICOM series of one folder, slices sorted by position; and its DICOM files that belong to none."""
    uids = sorted(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))
    unused = set(dicom)
    for uid in uids:
        files = tuple(map(str, sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)))
        unused.difference_update(files)
        if files:
            name = f"{stem}_{hashlib.sha256(uid.encode()).hexdigest()[:8]}" if len(uids) > 1 else stem
            yield name, Volume("", files, uid)
    if unused:
        yield f"{stem}_unreadable", Volume("", tuple(sorted(unused)), unreadable=True)


def _new_name(stem: str, taken: set[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_") or "case"
    if name.endswith("_seg"):  # nnU-Net keeps the segmentation of case X in X_seg
        name += "_image"
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique
