"""The archives of MSD and BTCV as they are extracted: which files there are, and what is wrong with them.

MSD  Task03_Liver/{imagesTr,labelsTr,imagesTs}/NAME.nii.gz and dataset.json
BTCV RawData/Training/img/img0001.nii.gz, RawData/Training/label/label0001.nii.gz
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_mim.errors import MiMError
from nnunet_mim.preparation.screening import damaged, header_problem, last_line

MSD_CASES = {
    "Task03_Liver": 131,
    "Task06_Lung": 63,
    "Task07_Pancreas": 281,
    "Task08_HepaticVessel": 303,
    "Task09_Spleen": 41,
    "Task10_Colon": 126,
}
"""the tasks of the Medical Segmentation Decathlon that are CT, with their published numbers of training cases"""
MSD_FOLDERS = ("imagesTr", "labelsTr", "imagesTs")
DESCRIPTION = "dataset.json"
MSD_KEYS = ("modality", "labels", "numTraining", "training", "test")
"""of dataset.json: without most of them nnU-Net's converter fails"""
BTCV_CASES = tuple(f"img{number:04d}" for number in (*range(1, 11), *range(21, 41)))
BTCV_LABELS = {
    name: value
    for value, name in enumerate(
        (
            "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
            "aorta", "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland",
            "left adrenal gland",
        )
    )
}  # fmt: skip
PACKED = (".tar", ".tar.gz", ".tgz", ".zip")
ENDING = ".nii.gz"
ORIGIN_TOLERANCE = 0.1
"""mm: headers of image and label are rounded differently; nnU-Net takes voxels by their index anyway"""
DIRECTION_TOLERANCE = 1e-3
"""of direction cosines"""
AGAIN = "extract the archive again"


@dataclass(frozen=True)
class Case:
    """One labelled training case."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Archive:
    """An extracted archive, as far as its file names tell."""

    folder: Path
    dataset: str
    """DatasetXXX_Name that it becomes"""
    labels: dict[str, int]
    """name → value, background included"""
    cases: tuple[Case, ...]
    """complete ones, sorted by name"""
    published: int
    """training cases of the whole archive"""
    unlabelled: tuple[Path, ...] = ()
    """test images that are converted too"""
    problems: tuple[str, ...] = ()
    """what is missing or too much, one line each with file and remedy"""

    @property
    def shown(self) -> str:
        """How it is called in messages."""
        return self.folder.name

    @property
    def is_btcv(self) -> bool:
        """BTCV, or else a task of MSD."""
        return self.dataset.endswith("_BTCV")

    def files(self) -> Iterator[Path]:
        """All images and labels."""
        for case in self.cases:
            yield from (case.image, case.label)
        yield from self.unlabelled


def find_msd(folder: Path, partial: bool = False) -> Archive:
    """What is in the folder of an extracted MSD archive.

    Args:
        folder: such as …/Task03_Liver.
        partial: cases that are missing, or lack image or label, are no problem.

    Raises:
        MiMError: it is not such a folder; says what to give.
    """
    folder = _existing(folder, "Task03_Liver", lambda path: any((path / name).is_dir() for name in MSD_FOLDERS))
    if folder.name not in MSD_CASES:
        raise MiMError(
            f"{folder} is none of MSD's CT tasks by its name: give a folder as extracted ({', '.join(MSD_CASES)}); "
            "nnU-Net datasets (DatasetXXX_Name) need no conversion"
        )
    parts = [name for name in MSD_FOLDERS if not (folder / name).is_dir()]
    parts += [] if (folder / DESCRIPTION).is_file() else [DESCRIPTION]
    if parts:
        hint = "; an empty imagesTs will do" if parts == ["imagesTs"] else ""
        raise MiMError(f"{folder} has no {', '.join(parts)}: {AGAIN}{hint}")
    description = read_description(folder / DESCRIPTION)
    images, labels, tests = (_volumes(folder / name) for name in MSD_FOLDERS)
    numbered = [path for path in images.values() if path.name.endswith(f"_0000{ENDING}")]
    if numbered:
        raise MiMError(f"{numbered[0]} has a channel number, as in nnU-Net datasets: give the archive as extracted")
    listed = {Path(entry["image"]).name for entry in description["training"]}
    files = {
        name: (folder / "imagesTr" / name, folder / "labelsTr" / name) for name in {*images, *labels, *listed}
    }  # fmt: skip
    task, _, name = folder.name.partition("_")
    values = {label: int(value) for value, label in description["labels"].items()}
    published = MSD_CASES[folder.name]
    archive = _archive(folder, f"Dataset{int(task[4:]):03d}_{name}", values, files, published, partial)
    said = description["numTraining"]
    if not archive.problems and len(archive.cases) == published != said and not partial:
        problem = f"{folder / DESCRIPTION} says {said} training cases, {published} are published and there: {AGAIN}"
        archive = replace(archive, problems=(problem,))
    return replace(archive, unlabelled=tuple(tests.values()))


def find_btcv(folder: Path, dataset_id: int, partial: bool = False) -> Archive:
    """What is in the folder of the extracted BTCV archive.

    Args:
        folder: …/RawData.
        dataset_id: number of the dataset it becomes, 1 to 999.
        partial: see `find_msd`.

    Raises:
        MiMError: it is not such a folder; says what to give.
    """
    if not 0 < dataset_id < 1000:
        raise MiMError(f"--btcv_id {dataset_id}: give a number from 1 to 999")
    folder = _existing(folder, "RawData", lambda path: (path / "Training").is_dir())
    training = folder / "Training"
    missing = [str(training / name) for name in ("img", "label") if not (training / name).is_dir()]
    if missing:
        raise MiMError(f"{missing[0]} is missing: {AGAIN}")
    images, labels = _volumes(training / "img"), _volumes(training / "label")
    files = {
        f"{case}{ENDING}": (training / "img" / f"{case}{ENDING}", training / "label" / f"label{case[3:]}{ENDING}")
        for case in BTCV_CASES
    }
    archive = _archive(folder, f"Dataset{dataset_id:03d}_BTCV", BTCV_LABELS, files, len(BTCV_CASES), partial)
    known = {path for pair in files.values() for path in pair}
    strange = [path for path in (*images.values(), *labels.values()) if path not in known]
    problems = [f"{path} is no case of BTCV's training set: move it away" for path in strange]
    return replace(archive, problems=(*archive.problems, *problems))


def read_description(path: Path) -> dict[str, Any]:
    """dataset.json of an MSD archive, checked.

    Raises:
        MiMError: it cannot be read, lacks what nnU-Net's converter needs, or is not of a CT.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MiMError(f"cannot read {path} ({last_line(error)}): {AGAIN}") from error
    lacking = [key for key in MSD_KEYS if key not in content] if isinstance(content, dict) else list(MSD_KEYS)
    if lacking:
        raise MiMError(f"{path} has no {', '.join(lacking)}, so it is not the one of the archive: {AGAIN}")
    if content["modality"] != {"0": "CT"}:
        raise MiMError(f"{path} says {content['modality']}, not CT alone: give one of {', '.join(MSD_CASES)}")
    try:
        values = sorted(int(value) for value in content["labels"])
        listed = [entry["image"] for entry in content["training"]]
    except (TypeError, ValueError, KeyError, AttributeError):
        values, listed = [], []
    if values != list(range(len(values))) or len(values) < 2 or not all(isinstance(name, str) for name in listed):
        raise MiMError(f"labels or training in {path} are not as in the archive: {AGAIN}")
    return content


def archive_problems(archive: Archive, threads: int, ignore_origin: bool = False) -> list[str]:
    """What is wrong in the files that are there, one line each with file and remedy. Reads them all, with a bar.

    Args:
        archive: from `find_msd` or `find_btcv`.
        threads: cases read at the same time; each takes the memory of a label image.
        ignore_origin: see `case_problems`.
    """
    values = set(archive.labels.values())

    def look(item: Case | Path) -> list[str]:
        if isinstance(item, Case):
            return case_problems(item, values, ignore_origin)
        return [problem for problem in [file_problem(item)] if problem]

    items = [*archive.cases, *archive.unlabelled]
    with ThreadPoolExecutor(threads) as pool:
        looked = tqdm(pool.map(look, items), total=len(items), desc=f"checking {archive.shown}", unit="case")
        return [problem for problems in looked for problem in problems]


def case_problems(case: Case, values: set[int], ignore_origin: bool = False) -> list[str]:
    """What is wrong with the voxels or the headers of a case, one line each with file and remedy.

    Args:
        case: its files are read once.
        values: that the label may have.
        ignore_origin: image and label may have different origins and directions, as nnU-Net allows.
    """
    broken = [problem for path in (case.image, case.label) if (problem := file_problem(path))]
    if broken:
        return broken
    problems = [geometry_problem(case.image, case.label, ignore_origin)]
    strange = sorted(label_values(case.label) - values)
    if strange:
        shown = ", ".join(f"{value:g}" for value in strange[:5]) + (", …" if len(strange) > 5 else "")
        problems.append(f"{case.label} has label values {shown}, expected 0 to {max(values)}: {AGAIN}")
    return [problem for problem in problems if problem]


def file_problem(path: Path) -> str | None:
    """Why a file is no whole 3-D volume, in one line with the remedy, or None. Reads all of it."""
    try:
        problem = damaged(path)
    except (ValueError, RuntimeError, nibabel.spatialimages.HeaderDataError) as error:
        problem = f"damaged ({last_line(error)})"
    if problem:
        return f"{path} is {problem}: {AGAIN}" if problem.startswith("damaged") else f"{path} {problem}: {AGAIN}"
    try:
        reader = _header(path)
    except RuntimeError as error:
        return f"{path} cannot be read by SimpleITK, which nnU-Net uses ({last_line(error)}): {AGAIN}"
    problem = header_problem(list(reader.GetSize()), list(reader.GetSpacing()), reader.GetNumberOfComponents(), 2)
    return f"{path} is {problem}, not a 3-D volume: {AGAIN}" if problem else None


def geometry_problem(image: Path, label: Path, ignore_origin: bool = False) -> str | None:
    """How the grid of a label differs from that of its image, in one line with the remedy, or None.

    Size and spacing are compared as nnU-Net's integrity check does, origin and direction with tolerances.
    """
    one, other = _header(image), _header(label)
    if one.GetSize() != other.GetSize():
        return f"{label} has {_x(other.GetSize())} voxels, its image {_x(one.GetSize())}: {AGAIN}"
    if not np.allclose(other.GetSpacing(), one.GetSpacing()):
        return f"{label} has spacing {_mm(other.GetSpacing())}, its image {_mm(one.GetSpacing())}: {AGAIN}"
    if ignore_origin:
        return None
    remedy = f"{AGAIN}; where they lie on each other voxel by voxel, as nnU-Net takes them, give --ignore_origin"
    if not np.allclose(other.GetOrigin(), one.GetOrigin(), rtol=0, atol=ORIGIN_TOLERANCE):
        return f"{label} has origin {_mm(other.GetOrigin())}, its image {_mm(one.GetOrigin())}: {remedy}"
    if not np.allclose(other.GetDirection(), one.GetDirection(), rtol=0, atol=DIRECTION_TOLERANCE):
        return f"{label} has another direction than its image: {remedy}"
    return None


def label_values(path: Path) -> set[float]:
    """Values that occur in a label image of NIfTI."""
    image: Any = nibabel.load(path)
    voxels = np.asanyarray(image.dataobj)
    return {float(value) for part in np.moveaxis(voxels, -1, 0) for value in np.unique(part)}


def _archive(
    folder: Path, dataset: str, labels: dict[str, int], files: dict[str, tuple[Path, Path]], published: int,
    partial: bool,
) -> Archive:  # fmt: skip
    """The complete cases among `files` (file name → where image and label should lie), and what is missing."""
    cases, problems, absent = [], [], []
    for name, (image, label) in sorted(files.items()):
        missing = [path for path in (image, label) if not path.is_file()]
        if not missing:
            cases.append(Case(name.removesuffix(ENDING), image, label))
        elif len(missing) == 2:
            absent.append(image)
        elif not partial:
            other = "label" if missing == [image] else "image"
            remedy = f"{AGAIN}, or leave the case out with --partial"
            problems.append(f"{missing[0]} is missing, its {other} is there: {remedy}")
    if not cases:
        raise MiMError(f"{folder} holds no case with image and label (*{ENDING}): {AGAIN}")
    if len(cases) > published:
        problems.append(f"{folder} has {len(cases)} training cases, {published} are published: take out what was added")
    elif len(cases) < published and not partial:
        first = f", {absent[0].name} among the missing" if absent else ""
        remedy = f"{AGAIN}, or take what is there with --partial"
        problems.append(f"{folder} has {len(cases)} of {published} training cases{first}: {remedy}")
    return Archive(folder, dataset, dict(labels), tuple(cases), published, problems=tuple(problems))


def _existing(folder: Path, example: str, fits: Callable[[Path], bool]) -> Path:
    """The folder as an absolute path, if it has the layout. MiMError otherwise, with what to give instead."""
    folder = Path(os.path.abspath(folder.expanduser()))
    if not folder.exists():
        raise MiMError(f"{folder} does not exist: give the folder {example} as extracted from its archive")
    if not folder.is_dir():
        what = "the archive itself" if folder.name.lower().endswith(PACKED) else "a file"
        raise MiMError(f"{folder} is {what}: extract the archive and give the folder {example} that comes out of it")
    if fits(folder):
        return folder
    inside = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir() and fits(path))
    above = next((path for path in folder.parents[:2] if fits(path)), None)
    packed = sorted(path for path in folder.iterdir() if path.name.lower().endswith(PACKED))
    if inside:
        more = f" (or another of the {len(inside)} in it)" if len(inside) > 1 else ""
        raise MiMError(f"{folder} has another layout: give {inside[0]}{more}")
    if above:
        raise MiMError(f"{folder} is a part of the archive: give {above}")
    if packed:
        raise MiMError(f"{folder} holds {packed[0].name}: extract it and give the folder {example} out of it")
    raise MiMError(f"{folder} has another layout: give the folder {example} as extracted from its archive")


def _volumes(folder: Path) -> dict[str, Path]:
    """Image files by their name; ._NAME (what macOS puts beside a file) and other hidden ones do not count."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "_")))
    unpacked = [path for path in paths if path.name.endswith(".nii")]
    if unpacked:
        raise MiMError(f"{unpacked[0]} has been decompressed: {AGAIN}, so that it is {unpacked[0].name}.gz")
    return {path.name: path for path in paths if path.name.endswith(ENDING)}


def _header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _x(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _mm(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)}) mm"
