"""One case: read, check, preprocess with nnU-Net's own code, save. Runs in a worker process."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.errors import MiMError
from nnunet_mim.preparation.finding import Volume
from nnunet_mim.preparation.resampling import LeanConfiguration
from nnunet_mim.preparation.screening import NOT_FINITE, damaged, last_line, voxel_problem
from nnunet_mim.pretraining.data.case_index import BODY_HU, describe_voxels

HISTOGRAM_HU = np.arange(-1050.0, 2051.0, 25.0)
"""edges of the bins; lower and higher voxels count in the first and last one"""
SAMPLE = 200
"""voxels of the body whose intensities are kept for the fingerprint"""
ENDINGS = ("_seg.b2nd", ".pkl", ".b2nd")
"""files of a preprocessed case; the last one makes it visible to nnU-Net"""


@dataclass(frozen=True)
class Job:
    """One case to prepare."""

    case: str
    images: tuple[str, ...]
    """a file a channel"""
    label: str | None
    series: Volume | None
    """DICOM series that `images` has to be made from first"""
    folder: str
    """of the preprocessed cases"""
    plans: Mapping[str, Any]
    configuration: str
    dataset_json: Mapping[str, Any]
    must_be_ct: bool
    """skip images that are no CT of a body"""
    body_threshold: float
    """normalised, see `case_index.body_threshold`"""


def partial_folder(folder: str, process: int) -> Path:
    """Where the cases of `folder` are written first by the command with this process number."""
    return Path(f"{folder}.partial-{process}")


def file_stamps(folder: Path, case: str) -> list[list[int]] | None:
    """Size and time of a preprocessed case's files; None where one is missing."""
    try:
        status = [(folder / f"{case}{ending}").stat() for ending in ENDINGS]
    except OSError:
        return None
    return [[s.st_size, s.st_mtime_ns] for s in status]


def prepare_case(job: Job, partial: str) -> dict[str, Any]:
    """Prepare one case.

    Args:
        job: what.
        partial: folder for half-written files, on the same disk as the job's.

    Returns:
        `{"problem": reason}`, or what the log keeps: hash, spacing and shape of the image, an intensity sample and
        histogram, the preprocessed case's CaseInfo, sizes and times of its files, seconds.

    Raises:
        MiMError: out of memory, or the output cannot be written.
    """
    began = time.perf_counter()
    running = Path(partial, f"{job.case}.running")
    running.touch()
    try:
        result = _prepare(job, Path(partial, job.case))
    except MiMError:
        raise
    except MemoryError as error:
        raise MiMError(f"out of memory at {job.images[0]}: repeat the command with fewer processes (-np)") from error
    except Exception as error:  # whatever is wrong with one image must not stop the others
        return {"problem": f"cannot be read or prepared ({last_line(error)})"}
    finally:
        running.unlink(missing_ok=True)
    return {**result, "seconds": time.perf_counter() - began}


def _prepare(job: Job, partial: Path) -> dict[str, Any]:
    if job.series is not None:
        write_series(job.series, Path(job.images[0]))
    for file in (*job.images, *([job.label] if job.label is not None else [])):
        if problem := damaged(Path(file)):
            return {"problem": problem if file != job.label else f"{problem}: {file}"}
    manager = PlansManager(dict(job.plans))
    configuration = LeanConfiguration(manager.get_configuration(job.configuration).configuration)
    reader = manager.image_reader_writer_class()
    data, properties = reader.read_images(job.images)
    seg = reader.read_seg(job.label)[0].astype(np.int16) if job.label is not None else None
    if job.must_be_ct and (problem := voxel_problem(data[0])):
        return {"problem": problem}
    if not np.isfinite([data.min(), data.max()]).all():
        return {"problem": NOT_FINITE}
    known = {
        "image_sha256": voxel_sha256(data),
        "spacing": [float(s) for s in properties["spacing"]],
        "shape": list(data.shape[1:]),
        "sample": body_sample(data),
        "histogram": np.sum([histogram(part) for part in data[0]], axis=0).tolist(),
    }
    only = [seg, data]  # nnU-Net makes copies; without another reference the originals need not stay in memory
    del data, seg
    prepared, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        only.pop(), only.pop(), properties, manager, configuration, dict(job.dataset_json)
    )
    properties.setdefault("class_locations", {})  # nnU-Net's data loader looks for it, labels or not
    info = describe_voxels(job.case, prepared, job.body_threshold)
    try:
        save(prepared, seg, properties, partial, tuple(configuration.patch_size))
        stamps = move(partial, Path(job.folder), job.case)
    except (OSError, RuntimeError) as error:  # Blosc2's errors are RuntimeErrors
        raise MiMError(
            f"cannot write {job.folder} ({last_line(error)}): free space, then repeat the command"
        ) from error
    return {**known, "info": asdict(info), "stamps": stamps}


def write_series(series: Volume, path: Path) -> None:
    """Write a DICOM series as an image file, in Hounsfield units. It appears whole or not at all."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(series.files)
    image = reader.Execute()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        sitk.WriteImage(image, str(temporary), useCompression=True)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise MiMError(f"cannot write {path} ({last_line(error)}): free space, then repeat the command") from error


def histogram(voxels: np.ndarray) -> np.ndarray:
    """Voxels by HISTOGRAM_HU."""
    return np.histogram(voxels.clip(HISTOGRAM_HU[0], HISTOGRAM_HU[-1]), HISTOGRAM_HU)[0]


def body_sample(data: np.ndarray) -> list[list[float]]:
    """Intensities of up to SAMPLE voxels inside the body (by channel 0), per channel (C lists)."""
    random = np.random.default_rng(0)
    places = random.integers(data[0].size, size=20 * SAMPLE)
    first = data[0].reshape(-1)[places]
    places = places[first > BODY_HU][:SAMPLE]
    return [channel.reshape(-1)[places].round(3).tolist() for channel in data]


def save(
    data: np.ndarray, seg: np.ndarray, properties: dict[str, Any], partial: Path, patch_size: tuple[int, ...]
) -> None:
    """Write a case with nnU-Net's own function, chunks included.

    Args:
        data, seg, properties: of nnU-Net's preprocessing.
        partial: path without an ending.
        patch_size: of the plans, which decides the chunks.
    """
    seg = seg.astype(np.int16, copy=False)
    blocks, chunks = comp_blosc2_params(data.shape, patch_size, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, patch_size, seg.itemsize)
    nnUNetDatasetBlosc2.save_case(
        data, seg, properties, str(partial), chunks=chunks, blocks=blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg
    )


def move(partial: Path, folder: Path, case: str) -> list[list[int]] | None:
    """Move the files of a case to where they belong, when they are safe on the disk; the one that shows the case to
    nnU-Net last. Returns their stamps.
    """
    for ending in ENDINGS:
        with open(f"{partial}{ending}", "rb") as file:
            os.fsync(file.fileno())
    for ending in ENDINGS:
        os.replace(f"{partial}{ending}", folder / f"{case}{ending}")
    return file_stamps(folder, case)
