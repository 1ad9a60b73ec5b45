"""The archives of MSD and BTCV as they are extracted: which files they have, and what is wrong with them.

MSD  Task03_Liver/{imagesTr,labelsTr,imagesTs}/NAME.nii.gz and dataset.json
BTCV RawData/Training/img/img0001.nii.gz, RawData/Training/label/label0001.nii.gz
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import nibabel
import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.errors import MiMError, last_line, printable
from nnunet_mim.nnunet.documents import Count, FileName, checked, document
from nnunet_mim.nnunet.image_files import damaged, file_problem, header_of
from nnunet_mim.nnunet.labels import geometry_differences
from nnunet_mim.preparation.screening import shape_problem, spacing_problem
from nnunet_mim.system.guarded import Failure, Limits, guarded_map
from nnunet_mim.system.progress import ProgressBar
from nnunet_mim.system.untrusted import read_json

MSD_CASES = {
    "Task03_Liver": 131,
    "Task06_Lung": 63,
    "Task07_Pancreas": 281,
    "Task08_HepaticVessel": 303,
    "Task09_Spleen": 41,
    "Task10_Colon": 126,
}
"""the CT tasks of the Medical Segmentation Decathlon, with their published numbers of training cases"""
MSD_FOLDERS = ("imagesTr", "labelsTr", "imagesTs")
MSD_KEYS = ("modality", "labels", "numTraining", "training")
"""keys of dataset.json that are read"""
ABOUT = ("name", "description", "reference", "licence", "release", "relase", "tensorImageSize")
"""keys that are kept for nnU-Net's dataset.json, one of them misspelt in the archives; nnU-Net acts on none"""
BTCV_CASES = tuple(f"img{number:04d}" for number in (*range(1, 11), *range(21, 41)))
BTCV_NAMES = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip
BTCV_ABOUT = {"name": "BTCV", "reference": "https://www.synapse.org/Synapse:syn3193805", "licence": "see the reference"}
BTCV_LABELS = {name: value for value, name in enumerate(BTCV_NAMES)}
PACKED = (".tar", ".tar.gz", ".tgz", ".zip")
ENDING = ".nii.gz"
AGAIN = "extract the archive again"
ITEM_LIMITS = Limits(seconds=600, memory=16 << 30)
"""an image and a label of 512 x 512 x 1000 take ten seconds and two gigabytes"""


LabelNumber = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})$")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]


@document
class ListedCase(TypedDict):
    """An entry of `training` in an archive's dataset.json."""

    image: FileName


@document
class Description(TypedDict):
    """dataset.json of an MSD archive."""

    labels: Annotated[dict[LabelNumber, Text], Field(min_length=2)]
    numTraining: Count
    training: list[ListedCase]
    name: NotRequired[Text]
    description: NotRequired[Text]
    reference: NotRequired[Text]
    licence: NotRequired[Text]
    release: NotRequired[Text]
    relase: NotRequired[Text]
    tensorImageSize: NotRequired[Text]


DESCRIPTION = TypeAdapter(Description)


class ArchiveCase(NamedTuple):
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
    cases: tuple[ArchiveCase, ...]
    """complete ones, sorted by name"""
    published: int
    """number of training cases of the whole archive"""
    about: dict[str, Any]
    """name, reference and licence, for nnU-Net's dataset.json"""
    unlabelled: tuple[Path, ...] = ()
    """test images that are converted too"""
    problems: tuple[str, ...] = ()
    """what is missing or does not belong there, one line each with file and remedy"""

    @property
    def is_btcv(self) -> bool:
        """Whether it is BTCV, or else a task of MSD."""
        return self.dataset.endswith("_BTCV")


def find_msd(folder: Path, partial: bool = False) -> Archive:
    """The content of an extracted MSD archive (…/Task03_Liver).

    With `partial`, cases that are missing, or lack image or label, are no problem. Raises MiMError where it is no such
    folder, and names the right one.
    """
    folder = _with_layout(folder, "Task03_Liver", lambda path: any((path / name).is_dir() for name in MSD_FOLDERS))
    if folder.name not in MSD_CASES:
        raise MiMError(
            f"{folder} is none of MSD's CT tasks by its name: give a folder as extracted ({', '.join(MSD_CASES)}); "
            "nnU-Net datasets (DatasetXXX_Name) need no conversion"
        )
    if missing := [name for name in (*MSD_FOLDERS, "dataset.json") if not (folder / name).exists()]:
        hint = "; an empty imagesTs will do" if missing == ["imagesTs"] else ""
        raise MiMError(f"{folder} has no {', '.join(missing)}: {AGAIN}{hint}")
    description = _read_description(folder / "dataset.json")
    images, labels, tests = (_volumes(folder / name) for name in MSD_FOLDERS)
    if numbered := [path for path in images.values() if path.name.endswith(f"_0000{ENDING}")]:
        raise MiMError(f"{numbered[0]} has a channel number, as in nnU-Net datasets: give the archive as extracted")
    listed = {Path(entry["image"]).name for entry in description["training"]}
    files = {name: (folder / "imagesTr" / name, folder / "labelsTr" / name) for name in {*images, *labels, *listed}}
    values = {label: int(value) for value, label in description["labels"].items()}
    published, stated = MSD_CASES[folder.name], description["numTraining"]
    cases, problems = _complete_cases(folder, files, published, partial)
    if not problems and len(cases) == published != stated and not partial:
        problems = [f"{folder}/dataset.json says {stated} training cases, {published} are published and there: {AGAIN}"]
    dataset = f"Dataset0{folder.name.removeprefix('Task')}"
    about = {key: description[key] for key in ABOUT if key in description}
    return Archive(folder, dataset, values, tuple(cases), published, about, tuple(tests.values()), tuple(problems))


def find_btcv(folder: Path, dataset_id: int, partial: bool = False) -> Archive:
    """The content of the extracted BTCV archive (…/RawData), which becomes dataset `dataset_id`; see `find_msd`."""
    if not 0 < dataset_id < 1000:
        raise MiMError(f"--btcv_id {dataset_id}: give a number from 1 to 999")
    folder = _with_layout(folder, "RawData", lambda path: (path / "Training").is_dir())
    images, labels = folder / "Training" / "img", folder / "Training" / "label"
    if missing := [path for path in (images, labels) if not path.is_dir()]:
        raise MiMError(f"{missing[0]} is missing: {AGAIN}")
    files = {f"{c}{ENDING}": (images / f"{c}{ENDING}", labels / f"label{c[3:]}{ENDING}") for c in BTCV_CASES}
    present = [*_volumes(images).values(), *_volumes(labels).values()]
    cases, problems = _complete_cases(folder, files, len(BTCV_CASES), partial)
    expected = {path for pair in files.values() for path in pair}
    strange = [path for path in present if path not in expected]
    problems += [f"{path} is no case of BTCV's training set: move it away" for path in strange]
    dataset = f"Dataset{dataset_id:03d}_BTCV"
    return Archive(folder, dataset, BTCV_LABELS, tuple(cases), len(BTCV_CASES), BTCV_ABOUT, problems=tuple(problems))


def _read_description(path: Path) -> dict[str, Any]:
    """dataset.json of an MSD archive. Raises MiMError unless it is one, of a CT."""
    content = read_json(path, AGAIN)
    lacking = [key for key in MSD_KEYS if key not in content] if isinstance(content, dict) else list(MSD_KEYS)
    if lacking:
        raise MiMError(f"{path} has no {', '.join(lacking)}, so it is not the one of the archive: {AGAIN}")
    if content["modality"] != {"0": "CT"}:
        stated = printable(str(content["modality"])[:100])
        raise MiMError(f"{path} says {stated}, not CT alone: give one of {', '.join(MSD_CASES)}")
    checked(str(path), content, DESCRIPTION, AGAIN)
    names = content["labels"]
    if {*names} != {*map(str, range(len(names)))} or names["0"] != "background" or len({*names.values()}) < len(names):
        raise MiMError(f"{path}: labels are not background and others, numbered from 0, each once: {AGAIN}")
    return content


def archive_problems(archive: Archive, processes: int, ignore_origin: bool = False) -> list[str]:
    """What is wrong in the files, one line each with file and remedy. Reads them all, with a progress bar.

    Guarded worker processes read a case each; each takes the memory of a label image. With `ignore_origin`, image and
    label may have different origins and directions, as nnU-Net allows.
    """
    items = [*archive.cases, *archive.unlabelled]
    check = partial(_item_problems, set(archive.labels.values()), ignore_origin)
    problems: dict[int, list[str]] = {}
    with closing(guarded_map(check, items, processes, ITEM_LIMITS)) as outcomes:
        checked = ProgressBar(outcomes, total=len(items), desc=f"checking {archive.folder.name}", unit="case")
        for index, outcome in checked:
            item = items[index]
            path = item if isinstance(item, Path) else item.image
            failed = isinstance(outcome, Failure)
            problems[index] = [f"{path} cannot be read ({outcome.reason}): {AGAIN}"] if failed else outcome
    return [problem for _, found in sorted(problems.items()) for problem in found]


def _item_problems(values: set[int], ignore_origin: bool, item: ArchiveCase | Path) -> list[str]:
    """What is wrong with a case or an image. May crash, hang or need much memory."""
    files = [item] if isinstance(item, Path) else [item.image, item.label]
    found = [_file_problem(file) for file in files]
    if not isinstance(item, Path) and not any(found):
        found = [_geometry_problem(item.image, item.label, ignore_origin), _value_problem(item.label, values)]
    return [problem for problem in found if problem]


def _file_problem(path: Path) -> str | None:
    """Why a file is no complete 3-D volume, in one line with the remedy, or None. Reads all of it."""
    if problem := file_problem(str(path)):
        return f"{path} {problem}: {AGAIN}"
    try:
        problem = damaged(path)
    except (ValueError, RuntimeError, nibabel.spatialimages.HeaderDataError) as error:
        problem = f"damaged ({last_line(error)})"
    if problem:
        return f"{path} is {problem}: {AGAIN}" if problem.startswith("damaged") else f"{path} {problem}: {AGAIN}"
    try:
        reader = header_of(path)
    except RuntimeError as error:
        return f"{path} cannot be read by SimpleITK, which nnU-Net uses ({last_line(error)}): {AGAIN}"
    problem = shape_problem(reader.GetSize(), reader.GetNumberOfComponents(), 2) or spacing_problem(reader.GetSpacing())
    return f"{path} is {problem}, not a 3-D volume: {AGAIN}" if problem else None


def _geometry_problem(image: Path, label: Path, ignore_origin: bool = False) -> str | None:
    """How the grid of a label differs from that of its image, in one line with the remedy, or None.

    Size and spacing are compared as in nnU-Net's integrity check; origin and direction with tolerances, since headers
    are rounded differently.
    """
    differences = geometry_differences(label, image)
    remedy = f"{AGAIN}; where they lie on each other voxel by voxel, as nnU-Net takes them, give --ignore_origin"
    for kind, difference in differences.items():
        if kind in ("size", "spacing"):
            return f"{label} {difference}: {AGAIN}"
        if not ignore_origin:
            return f"{label} {difference}: {remedy}"
    return None


def _value_problem(label: Path, values: set[int]) -> str | None:
    """Which values of a label image are not among `values`, in one line with the remedy, or None."""
    image: Any = nibabel.load(label)
    slices = np.moveaxis(np.asanyarray(image.dataobj), -1, 0)
    unexpected = sorted({float(value) for voxels in slices for value in np.unique(voxels)} - values)
    if not unexpected:
        return None
    shown = ", ".join(f"{value:g}" for value in unexpected[:5]) + (", …" if len(unexpected) > 5 else "")
    return f"{label} has label values {shown}, expected 0 to {max(values)}: {AGAIN}"


def _complete_cases(
    folder: Path, files: dict[str, tuple[Path, Path]], published: int, partial: bool
) -> tuple[list[ArchiveCase], list[str]]:
    """The complete cases among `files` (file name → where image and label should be), and what is missing."""
    cases, problems, absent = [], [], []
    for name, (image, label) in sorted(files.items()):
        missing = [path for path in (image, label) if not path.is_file()]
        if not missing:
            cases.append(ArchiveCase(name.removesuffix(ENDING), image, label))
        elif len(missing) == 2:
            absent.append(image)
        elif not partial:
            other = f"its {'label' if missing == [image] else 'image'} is there"
            problems.append(f"{missing[0]} is missing, {other}: {AGAIN}, or leave the case out with --partial")
    if not cases:
        raise MiMError(f"{folder} holds no case with image and label (*{ENDING}): {AGAIN}")
    if len(cases) > published:
        problems.append(f"{folder} has {len(cases)} training cases, {published} are published: take out what was added")
    elif len(cases) < published and not partial:
        first = f", {absent[0].name} among the missing" if absent else ""
        counts = f"{len(cases)} of {published} training cases"
        problems.append(f"{folder} has {counts}{first}: {AGAIN}, or take what is there with --partial")
    return cases, problems


def _with_layout(folder: Path, example: str, fits: Callable[[Path], bool]) -> Path:
    """The folder as an absolute path, if it has the layout. MiMError otherwise, with the folder to give instead."""
    folder = Path(os.path.abspath(folder.expanduser()))
    remedy = f"give the folder {example} as extracted from its archive"
    if not folder.exists():
        raise MiMError(f"{folder} does not exist: {remedy}")
    if not folder.is_dir():
        what = "the archive itself" if folder.name.lower().endswith(PACKED) else "a file"
        raise MiMError(f"{folder} is {what}: extract the archive, then {remedy}")
    if fits(folder):
        return folder
    inside = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir() and fits(path))
    if inside:
        others = f" (or another of the {len(inside)} in it)" if len(inside) > 1 else ""
        raise MiMError(f"{folder} has another layout: give {inside[0]}{others}")
    if above := next((path for path in folder.parents[:2] if fits(path)), None):
        raise MiMError(f"{folder} is a part of the archive: give {above}")
    if packed := sorted(path for path in folder.iterdir() if path.name.lower().endswith(PACKED)):
        raise MiMError(f"{folder} holds {packed[0].name}: extract it, then {remedy}")
    raise MiMError(f"{folder} has another layout: {remedy}")


def _volumes(folder: Path) -> dict[str, Path]:
    """Image files by their name; ._NAME (what macOS puts beside a file) and other hidden ones do not count."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "_")))
    if unpacked := [path for path in paths if path.name.endswith(".nii")]:
        raise MiMError(f"{unpacked[0]} has been decompressed: {AGAIN}, so that it is {unpacked[0].name}.gz")
    return {path.name: path for path in paths if path.name.endswith(ENDING)}
