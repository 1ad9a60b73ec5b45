"""One image as people name it, a file or a DICOM folder per channel, read with SimpleITK in a guarded worker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_mim.errors import MiMError, last_line
from nnunet_mim.nnunet.dicom import dicom_problem, read_series, series_of
from nnunet_mim.nnunet.image_files import (
    DIRECTION_COSINE,
    NOT_FINITE,
    ORIGIN_MM,
    READ_SECONDS,
    FileHeader,
    case_name,
    damaged,
    file_problem,
    header_of,
    promise_problem,
    read_headers,
)
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory

GIVE = "give NIfTI, NRRD or MHA files, or a folder with the DICOM files of one CT"


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an array with three axes lie in the patient, in SimpleITK's axes (to left, back, head)."""

    origin: np.ndarray
    """(3,) mm, centre of voxel (0, 0, 0)"""
    steps: np.ndarray
    """(3, 3) mm, column i: from one voxel to the next along array axis i"""

    def part(self, first: Sequence[float], step: Sequence[float]) -> Grid:
        """Grid of larger or smaller voxels that fill the same space.

        Args:
            first: voxel at whose lower corner the new grid starts; may be fractional or negative.
            step: width of a new voxel in voxels of this grid, per axis.
        """
        centre = np.asarray(first, float) + 0.5 * np.asarray(step, float) - 0.5
        return Grid(self.origin + self.steps @ centre, self.steps * np.asarray(step, float))

    def reordered(self, axes: Sequence[int]) -> Grid:
        """Grid of the array after `array.transpose(axes)`."""
        return Grid(self.origin, self.steps[:, list(axes)])


@dataclass(frozen=True)
class RawImage:
    """One image of one or several channels."""

    name: str
    voxels: np.ndarray
    """(C, Z, Y, X) float32"""
    grid: Grid
    """place of every channel, axes z, y, x"""

    @property
    def spacing(self) -> np.ndarray:
        """Millimetres between voxels along z, y, x."""
        return np.linalg.norm(self.grid.steps, axis=0)

    @property
    def direction(self) -> np.ndarray:
        """Direction matrix (3, 3) as in SimpleITK: columns for x, y, z."""
        return (self.grid.steps / self.spacing)[:, ::-1]


def read_image(paths: Sequence[Path]) -> RawImage:
    """Read the channels of one case, one file or DICOM folder per channel, all of the same size and place.

    A guarded worker process reads. Raises MiMError for a file that is missing, unreadable, no volume, in colour, not
    finite or all 0.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise MiMError(f"{missing[0]} does not exist: {GIVE}")
    single = [path for path in paths if not path.is_dir()]
    headers = dict(zip(single, read_headers([str(path) for path in single], 1), strict=True))
    files = [_files_in(path) if path.is_dir() else _sound_file(path, headers[path]) for path in paths]
    limits = Limits(READ_SECONDS, share_of_memory(physical_memory(), 1))
    with closing(guarded_map(_read_case, [(paths, files)], 1, limits)) as outcomes:
        (outcome,) = (result for _, result in outcomes)
    if isinstance(outcome, Failure):
        raise MiMError(f"cannot read {paths[0]} ({outcome.reason}): {GIVE}")
    return outcome


def _sound_file(path: Path, header: FileHeader | str | None) -> tuple[str]:
    """The file, whose header promises a volume or is not of a known kind. Raises MiMError for any other."""
    problem = header
    if isinstance(header, FileHeader):
        _check_shape(path, header.components, header.size)
        problem = header.problem
    if problem:
        raise _refusal(path, str(problem))
    return (str(path),)


def _refusal(path: Path, problem: str) -> MiMError:
    if problem.startswith("damaged"):
        return MiMError(f"{path} is {problem}: {GIVE}")
    return MiMError(f"{path} {problem}: {GIVE}" if problem.startswith("cannot be") else f"{path}: {problem}; {GIVE}")


def _check_shape(path: Path, components: int, size: Sequence[int]) -> None:
    """MiMError for what is no grey volume: components (values a voxel), size (voxels)."""
    if components > 1:
        raise MiMError(f"{path} has {components} values a voxel (colour): give a grey CT")
    if len(size) != 3 or min(size) < 2:
        raise MiMError(f"{path} is no volume (size {' × '.join(map(str, size))}) along x y z: give a 3-D CT")


def _files_in(folder: Path) -> tuple[str, ...]:
    """The slices of the one CT in a DICOM folder. Raises MiMError where there is none or more than one."""
    paths = sorted(entry.path for entry in os.scandir(folder) if not entry.name.startswith("._"))
    headers = dict(zip(paths, read_headers(paths, 1), strict=True))
    dicom = {path: header for path, header in headers.items() if isinstance(header, FileHeader) and header.tags}
    found = [series for parts in series_of(dicom) for series in parts]
    problems = [dicom_problem(series.header) or series.header.problem for series in found]
    usable = [series for series, problem in zip(found, problems, strict=True) if not problem and series.is_volume]
    if len(usable) == 1:
        return usable[0].files
    if usable:
        shown = ", ".join(f"{len(series.files)} files from {Path(series.files[0]).name}" for series in usable)
        raise MiMError(f"{folder} holds {len(usable)} CT series ({shown}): give a folder that holds one of them")
    reason = next(filter(None, problems), "no DICOM of a volume directly in it")
    raise MiMError(f"{folder} is a folder without a CT ({reason}): {GIVE}")


def _read_case(case: tuple[Sequence[Path], Sequence[tuple[str, ...]]]) -> RawImage:
    """What `read_image` returns, from paths as they were given and the files of each."""
    paths, files = case
    images = [_read(path, parts) for path, parts in zip(paths, files, strict=True)]
    first = images[0]
    for path, image in zip(paths, images, strict=True):
        same_spacing = np.allclose(image.GetSpacing(), first.GetSpacing(), rtol=1e-3)
        same_origin = np.allclose(image.GetOrigin(), first.GetOrigin(), rtol=0, atol=ORIGIN_MM)
        same_direction = np.allclose(image.GetDirection(), first.GetDirection(), rtol=0, atol=DIRECTION_COSINE)
        if image.GetSize() != first.GetSize() or not (same_spacing and same_origin and same_direction):
            raise MiMError(f"{path} has another size, spacing, origin or direction than {paths[0]}: channels must fit")
    voxels = np.stack([sitk.GetArrayFromImage(image) for image in images]).astype(np.float32)
    if not np.isfinite(voxels).all():
        raise MiMError(f"{paths[0]} {NOT_FINITE}: correct the image")
    if not voxels.any():
        raise MiMError(f"{paths[0]} holds nothing but zeros: give a CT in Hounsfield units")
    direction = np.array(first.GetDirection()).reshape(3, 3)
    steps = (direction * np.array(first.GetSpacing()))[:, ::-1]
    return RawImage(case_name(paths[0]), voxels, Grid(np.array(first.GetOrigin()), steps))


def _read(path: Path, files: tuple[str, ...]) -> sitk.Image:
    """The volume in a file, or in the slices of a series. What the header promises is looked at before any voxel."""
    problem = file_problem(files[0])
    if problem is None and len(files) == 1:
        problem = damaged(path)
    if problem:
        raise _refusal(path, problem)
    try:
        if len(files) == 1:
            header = header_of(files[0])
            _check_shape(path, header.GetNumberOfComponents(), header.GetSize())
            if problem := promise_problem(files[0], header):
                raise _refusal(path, problem)
        image = read_series(files)
    except MiMError:
        raise
    except RuntimeError as error:
        raise MiMError(f"cannot read {path} as an image ({last_line(error)}): {GIVE}") from error
    _check_shape(path, image.GetNumberOfComponentsPerPixel(), image.GetSize())
    return image
