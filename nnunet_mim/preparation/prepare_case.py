"""Read, check, preprocess and save cases with nnU-Net's own code, each in a worker process."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.errors import MiMError, last_line
from nnunet_mim.nnunet.dicom import read_series
from nnunet_mim.nnunet.image_files import NOT_FINITE, damaged, voxel_files, write_image
from nnunet_mim.nnunet.labels import geometry_differences, read_label
from nnunet_mim.nnunet.source import Source
from nnunet_mim.preparation.finding import Volume
from nnunet_mim.preparation.resampling import LeanConfiguration
from nnunet_mim.preparation.screening import voxel_problem, voxel_warnings
from nnunet_mim.pretraining.data.case_index import BODY_HU, describe_voxels
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory

CONFIGURATION = "3d_fullres"
"""the one configuration that mim_prepare makes"""
CASE_SECONDS = 1800.0
"""limit for one case: a hundred times what a CT of 512 x 512 x 1000 takes on one core"""
HISTOGRAM_HU = np.arange(-1050.0, 2051.0, 25.0)
"""edges of the histogram's bins; the first and the last bin hold everything beyond them"""
ENDINGS = ("_seg.b2nd", ".pkl", ".b2nd")
"""endings of the files of a preprocessed case; the last one makes it visible to nnU-Net"""


@dataclass(frozen=True)
class RawCase:
    """One case as it lies in the user's folders."""

    name: str
    images: tuple[str, ...]
    """one file per channel, as nnU-Net reads them"""
    label: str | None = None
    found: Volume | None = None
    """what was found in a folder; None for a dataset in nnUNet_raw"""

    @property
    def series(self) -> Volume | None:
        """DICOM series that `images` has to be made from first."""
        return self.found if self.found is not None and self.found.series else None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The user's files that decide the result."""
        images = self.images if self.series is None else self.series.files
        labels = () if self.label is None else (self.label,)
        return (*images, *labels, *(file for image in images for file in voxel_files(image)))


@dataclass(frozen=True)
class Job:
    """One case to prepare."""

    case: RawCase
    source: Source
    """plans, and the folder of the preprocessed cases"""
    dataset_json: Mapping[str, Any]
    must_be_ct: bool
    """whether to leave out images that are no CT of a body"""
    min_slices: int
    """minimum number of voxels on every axis of the preprocessed case"""
    label_values: tuple[int, ...] = ()
    """that may occur in the label"""
    warnings: tuple[str, ...] = ()
    """what is doubtful about the header of the image, a sentence each"""
    key: str = ""
    """`input_key` of the case: its result is true as long as this is the same"""


def file_stamps(folder: Path, case: str) -> list[list[int]] | None:
    """Sizes and modification times of a preprocessed case's files; None where one is missing."""
    try:
        status = [(folder / f"{case}{ending}").stat() for ending in ENDINGS]
    except OSError:
        return None
    return [[s.st_size, s.st_mtime_ns] for s in status]


def run_jobs(jobs: Sequence[Job], processes: int) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Prepare cases in guarded worker processes; yields (case, result) as they are finished.

    A case that dies or needs more than its share of memory is tried once more, alone. Raises MiMError where a worker
    could not write. Finished cases are kept.
    """
    if not jobs:
        return
    node = platform.node().replace("-", "_")  # several machines may prepare cases of one dataset
    partial = Path(f"{jobs[0].source.folder}.partial-{node}-{os.getpid()}")  # half-written cases
    remove_abandoned(partial)
    partial.mkdir()
    try:
        alone = []
        for index, result in _outcomes(jobs, min(processes, len(jobs)), partial):
            if isinstance(result, Failure) and result.needs_memory and processes > 1:
                alone.append(jobs[index])
            else:
                yield jobs[index].case.name, _result(result)
        for index, result in _outcomes(alone, 1, partial):
            yield alone[index].case.name, _result(result)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        series = {Path(job.case.images[0]) for job in jobs if job.case.series is not None}
        for folder in {path.parent for path in series}:
            for unfinished in folder.glob(".[0-9]*.nii.gz"):  # of workers that were ended
                if folder / unfinished.name.split(".", 2)[2] in series:  # others are written by other machines
                    unfinished.unlink(missing_ok=True)


def _outcomes(jobs: Sequence[Job], processes: int, partial: Path) -> Iterator[tuple[int, Any]]:
    """(index, result or Failure) of each job; processes share the memory of the machine."""
    limits = Limits(CASE_SECONDS, share_of_memory(physical_memory(), max(1, processes)))
    items = [(job, str(partial)) for job in jobs]
    with closing(guarded_map(_prepare_case, items, processes, limits)) as outcomes:
        yield from outcomes


def _result(outcome: dict[str, Any] | Failure) -> dict[str, Any]:
    if isinstance(outcome, Failure):
        return {"problem": f"cannot be read or prepared ({outcome.reason})"}
    return outcome


def remove_abandoned(partial: Path) -> None:
    """Remove the folders NAME-PROCESS beside `partial`, which has such a name, whose process has ended."""
    if os.name == "nt":  # os.kill(…, 0) ends a process there
        return
    stem = partial.name.rsplit("-", 1)[0]
    for folder in partial.parent.glob(f"{stem}-*"):
        try:
            os.kill(int(folder.name.rsplit("-", 1)[1]), 0)
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)


def _prepare_case(item: tuple[Job, str]) -> dict[str, Any]:
    return prepare_case(*item)


def prepare_case(job: Job, partial: str) -> dict[str, Any]:
    """Prepare one case. `partial` is a folder for half-written files, on the disk of the preprocessed cases.

    Returns `{"problem": reason}`, or what the log keeps: warnings, hash, spacing and shape of the image, intensity
    sample and histogram, CaseInfo of the preprocessed case, stamps of its files, seconds. Raises MiMError for a full
    disk, and any error for an image that cannot be read.
    """
    began = time.perf_counter()
    result = _prepare(job, Path(partial, job.case.name))
    return {**result, "seconds": time.perf_counter() - began}


def _prepare(job: Job, partial: Path) -> dict[str, Any]:
    images, label = job.case.images, job.case.label
    if job.case.series is not None:
        _write_series(job.case.series, Path(images[0]))
    for file in images if label is None else (*images, label):
        if problem := damaged(Path(file)):
            return {"problem": problem if file != label else f"{problem}: {file}"}
    problem, doubts = _channels_problem(images)
    if problem:
        return {"problem": problem}
    manager = PlansManager(job.source.plans)
    configuration = LeanConfiguration(manager.get_configuration(CONFIGURATION).configuration)
    reader = manager.image_reader_writer_class()
    data, properties = reader.read_images(images)
    seg, doubts = None, [*job.warnings, *doubts]
    if label is not None:
        found = read_label(reader, label, images[0], job.label_values, str(partial))
        if isinstance(found, str):
            return {"problem": found}
        seg = found[0]
        doubts += found[1]
    if job.must_be_ct and (problem := voxel_problem(data[0])):
        return {"problem": problem}
    if not np.isfinite([data.min(), data.max()]).all():
        return {"problem": NOT_FINITE}
    doubts += voxel_warnings(data[0]) if job.source.intensities.is_ct() else ()
    image_facts = {
        "warnings": doubts,
        "image_sha256": voxel_sha256(data),
        "spacing": [float(s) for s in properties["spacing"]],
        "shape": list(data.shape[1:]),
        "sample": _body_sample(data),
        "histogram": np.sum([_histogram(part) for part in data[0]], axis=0).tolist(),
    }
    arrays = [seg, data]  # nnU-Net makes copies; without a reference here the originals need not stay in memory
    del data, seg
    prepared, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        arrays.pop(), arrays.pop(), properties, manager, configuration, dict(job.dataset_json)
    )
    if problem := _size_problem(prepared.shape[1:], job):
        return {"problem": problem}
    properties.setdefault("class_locations", {})  # nnU-Net's data loader needs it also without labels
    info = describe_voxels(job.source, job.case.name, prepared)
    try:
        save(prepared, seg, properties, partial, tuple(configuration.patch_size))
        stamps = _move(partial, job.source.folder, job.case.name)
    except (OSError, RuntimeError) as error:  # Blosc2's errors are RuntimeErrors
        raise MiMError(
            f"cannot write {job.source.folder} ({last_line(error)}): free space, then repeat the command"
        ) from error
    return {**image_facts, "info": asdict(info), "stamps": stamps}


def _channels_problem(images: Sequence[str]) -> tuple[str, list[str]]:
    """Why the channels of a case do not fit each other, or nothing; and what is doubtful about them."""
    doubts = []
    for image in images[1:]:
        for kind, difference in geometry_differences(image, images[0]).items():
            text = f"{Path(image).name} {difference.replace('its image', 'the first channel')}"
            if kind in ("size", "spacing"):
                return f"channels do not fit each other ({text})", []
            doubts.append(f"channels lie differently ({text}): each is turned by its own header")
    return "", doubts


def _size_problem(shape: Sequence[int], job: Job) -> str | None:
    """Why a preprocessed case of this shape (voxels) is too small, or None."""
    if min(shape) >= job.min_slices:
        return None
    voxels, mm = " x ".join(map(str, shape)), " x ".join(f"{s:g}" for s in job.source.spacing)
    return f"fewer than {job.min_slices} slices once resampled ({voxels} of {mm} mm, z y x)"


def _write_series(series: Volume, path: Path) -> None:
    """Write a DICOM series as an image file, in Hounsfield units, atomically."""
    image = read_series(series.files)
    try:
        write_image(image, path)
    except (OSError, RuntimeError) as error:
        raise MiMError(f"cannot write {path} ({last_line(error)}): free space, then repeat the command") from error


def _histogram(voxels: np.ndarray) -> np.ndarray:
    return np.histogram(voxels.clip(HISTOGRAM_HU[0], HISTOGRAM_HU[-1]), HISTOGRAM_HU)[0]


def _body_sample(data: np.ndarray) -> list[list[float]]:
    """Intensities of up to 200 random voxels inside the body, which channel 0 shows; one list per channel."""
    places = np.random.default_rng(0).integers(data[0].size, size=4000)
    places = places[data[0].reshape(-1)[places] > BODY_HU][:200]
    return [channel.reshape(-1)[places].round(3).tolist() for channel in data]


def save(
    data: np.ndarray, seg: np.ndarray, properties: dict[str, Any], partial: Path, patch_size: tuple[int, ...]
) -> None:
    """Write a preprocessed case with nnU-Net's own function to `partial`, a path without an ending."""
    seg = seg.astype(np.int16, copy=False)
    blocks, chunks = comp_blosc2_params(data.shape, patch_size, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, patch_size, seg.itemsize)
    nnUNetDatasetBlosc2.save_case(
        data, seg, properties, str(partial), chunks=chunks, blocks=blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg
    )


def _move(partial: Path, folder: Path, case: str) -> list[list[int]] | None:
    """Move the files of a case into its folder once they are safe on the disk. Returns their stamps."""
    for ending in ENDINGS:
        with open(f"{partial}{ending}", "rb") as file:
            os.fsync(file.fileno())
    for ending in ENDINGS:
        os.replace(f"{partial}{ending}", folder / f"{case}{ending}")
    return file_stamps(folder, case)
