"""Files of medical images: endings, case names, headers, damage.

What is in a file is read in guarded workers (`read_headers`); `header_of` and `damaged` are for these.
"""

from __future__ import annotations

import glob
import gzip
import math
import os
import re
import stat
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_mim.errors import last_line
from nnunet_mim.nnunet.dicom_frames import BETWEEN_FRAMES, frames_problem, place_problem, tags_of_frames
from nnunet_mim.nnunet.dicom_header import POSITION, geometry_problem, numbers, pixel_doubts, pixels_problem, tags_of
from nnunet_mim.nnunet.header_doubts import are_right_angles, header_doubts, length_problem, nifti_problem
from nnunet_mim.system.guarded import Failure, Limits, guarded_map
from nnunet_mim.system.progress import ProgressBar

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".hdr")
DICOM_ENDINGS = (".dcm", ".ima", ".dicom")
HEADER_LIMITS = Limits(seconds=5, memory=1 << 30)
"""a header is kilobytes, read in milliseconds, from a busy network disk in a second"""
LARGEST_COMPRESSION = 1032
"""how many bytes deflate makes of one at most"""
ORIGIN_MM, DIRECTION_COSINE = 0.1, 1e-3
"""differences of origins and of direction cosines that come from rounding"""
READ_SECONDS = 600.0
"""limit for one case: a hundred times what reading a CT of 512 x 512 x 1000 takes"""
READER = "SimpleITKIOWithReorient"
"""nnU-Net's reader where a checkpoint does not name one; `mim_prepare` uses it too"""
NOT_FINITE = "holds NaN or infinite voxels"
NO_IMAGES = {
    "481.3": "an RTSTRUCT", "481.5": "an RT plan", "481.8": "an RT plan", "88.": "an SR", "104.": "a document",
    "11.": "a presentation state", "66": "raw data or a registration", "9.": "a waveform",
}  # fmt: skip
"""DICOM objects without voxels, by how their class begins after `1.2.840.10008.5.1.4.1.1.`"""
DIRECTORY = b"1.2.840.10008.1.3.10"


@dataclass(frozen=True)
class FileHeader:
    """What the header of an image file, or of all files of a DICOM series, says."""

    size: tuple[int, ...]
    """voxels along x, y, z"""
    spacing: tuple[float, ...]
    """mm"""
    direction: tuple[float, ...]
    """cosines, as in SimpleITK"""
    components: int = 1
    """values per voxel"""
    tags: Mapping[str, str] = field(default_factory=dict)
    """those of DICOM that are there; empty for other files"""
    frames: tuple[tuple[float, ...], ...] = ()
    """positions of the frames of one DICOM file (mm), in the order of the voxels"""
    problem: str = ""
    """why slices or frames make no volume; empty if they do"""
    warnings: tuple[str, ...] = ()
    """what is doubtful, a sentence each"""


def case_name(path: Path) -> str:
    """File name without its ending and without _0000, nnU-Net's first channel."""
    name = next((path.name[: -len(e)] for e in ENDINGS if path.name.lower().endswith(e)), path.stem)
    return name.removesuffix("_0000") or name


def voxel_files(image: str) -> list[str]:
    """Files with the voxels of a header file (`.mhd`, `.nhdr`, `.hdr`); none for any other image file."""
    path = Path(image)
    if path.suffix.lower() == ".hdr":
        return [str(p) for p in (path.with_suffix(".img"), path.with_suffix(".IMG")) if p.is_file()][:1]
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return []
    return sorted(str(p) for p in path.parent.glob(f"{glob.escape(path.stem)}.*raw*"))


def printable(path: str) -> str:
    """A path as text that can be printed and stored, whatever bytes its name has."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


def file_problem(path: str) -> str | None:
    """Why a file must not be opened, or None. Asks the system only, so that no pipe is waited for."""
    if printable(path) != path:
        return "cannot be read (its name is not UTF-8): rename it"
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter for a NUL character
        return f"cannot be read ({path} is not there)"
    if not stat.S_ISREG(status.st_mode):
        return "cannot be read (no regular file: a folder, pipe, socket or device)"
    return None if status.st_size else "cannot be read (the file is empty)"


def read_headers(paths: Sequence[str], processes: int, title: str = "") -> list[FileHeader | str | None]:
    """The header of every file, why it cannot be read, or None for a file that is no image.

    Each is read in a worker process with limits on time and memory. A title shows a progress bar.
    """
    found: list[FileHeader | str | None] = [file_problem(path) for path in paths]
    sound = [index for index, problem in enumerate(found) if problem is None]
    reading = guarded_map(_read_header, [paths[index] for index in sound], processes, HEADER_LIMITS)
    with closing(reading):
        results = ProgressBar(reading, desc=title, total=len(sound), unit="file", disable=not (title and sound))
        for place, result in results:
            failed = isinstance(result, Failure)
            found[sound[place]] = f"cannot be read ({result.reason})" if failed else result
    return found


def _read_header(path: str) -> FileHeader | str | None:
    """What `read_headers` says about one file. May crash, hang or need much memory."""
    with open(path, "rb") as file:
        head = file.read(2048)
    dicom = is_dicom(path, head)
    if not dicom and not path.lower().endswith(ENDINGS):
        return None
    if path.lower().endswith(".hdr") and (problem := _pair_problem(path, head)):
        return problem
    try:
        reader = header_of(path)
    except RuntimeError as error:
        if path.lower().endswith(".gz") and not head.startswith(b"\x1f\x8b"):
            return "cannot be read (it is damaged: not compressed, as its name says)"
        return _no_image(head) if dicom else f"cannot be read ({last_line(error)})"
    size = reader.GetSize()
    if problem := promise_problem(path, reader):
        return problem
    tags = tags_of(reader) if dicom else {}
    is_grey = dicom and reader.GetNumberOfComponents() == 1
    if is_grey and (problem := pixels_problem(path, head, math.prod(size), tags)):
        return problem
    direction = reader.GetDirection()
    problem = None if are_right_angles(direction) else "its axes stand at no right angles"
    warnings: tuple[str, ...] = ()
    frames: tuple[tuple[float, ...], ...] = ()
    if dicom and math.prod(size[2:]) > 1:
        tags |= tags_of_frames(path)
        frames = tuple(numbers(text, 3) for text in tags.pop(POSITION, "").split(BETWEEN_FRAMES))
        problem = problem or frames_problem(frames, size[2], direction)
    if dicom:
        problem, warnings = problem or geometry_problem(tags, reader), pixel_doubts(tags)
    if frames:
        problem = problem or place_problem(frames, reader)
    if not dicom and not problem:
        problem = nifti_problem(path)
    if not dicom and len(size) == 3 and not problem:
        steps = np.reshape(direction, (3, 3)) * np.array(reader.GetSpacing())
        warnings = header_doubts(path, size, steps)
    components = reader.GetNumberOfComponents()
    return FileHeader(size, reader.GetSpacing(), direction, components, tags, frames, problem or "", warnings)


def _pair_problem(path: str, head: bytes) -> str | None:
    """Why a `.hdr` file with these first bytes is no NIfTI header with its voxels beside it, or None."""
    if not voxel_files(path):
        return "cannot be read (there is no .img file beside it)"
    return None if head[344:347] == b"ni1" else "no NIfTI pair (Analyze says no orientation): convert it to NIfTI"


def is_dicom(path: str, head: bytes) -> bool:
    """Whether a file with these first bytes is DICOM: by its ending, its preamble or its first element."""
    if DIRECTORY in head or Path(path).name.upper() == "DICOMDIR":
        return False
    without_preamble = head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\x00" and b"1.2.840.10008." in head
    return path.lower().endswith(DICOM_ENDINGS) or head[128:132] == b"DICM" or without_preamble


def _no_image(head: bytes) -> str:
    """Why a DICOM file with these first bytes cannot be read."""
    classes = re.findall(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.([0-9.]+)", head)
    for start, kind in NO_IMAGES.items():
        if classes and classes[0].decode().startswith(start):
            return f"no image ({kind})"
    return "cannot be read (DICOM that is damaged, or of a kind without an image)"


def _n_bytes(reader: sitk.ImageFileReader) -> int:
    """Bytes of the voxels that a header promises."""
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    width = next((bits // 8 for bits in (64, 32, 16) if f"{bits}-bit" in kind), 1)
    return math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * width


def promise_problem(path: str, reader: sitk.ImageFileReader) -> str | None:
    """Why an image file cannot hold the voxels that its header, which a reader has read, promises, or None."""
    n_bytes = _n_bytes(reader)
    stored = sum(os.path.getsize(file) for file in (path, *voxel_files(path)))
    if n_bytes > LARGEST_COMPRESSION * stored:
        return f"damaged (its header promises {n_bytes / 1e6:,.0f} MB of voxels, the file has {stored / 1e6:.2g})"
    return None


def header_of(path: str | Path) -> sitk.ImageFileReader:
    """A reader that has read the header of an image file, for guarded workers.

    Raises RuntimeError where SimpleITK cannot.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def damaged(path: Path) -> str | None:
    """Why a file is damaged, or None: it ends early, fails its checksum, or is NIfTI with NaN or infinite voxels.

    SimpleITK reads zeros in all these cases.
    """
    try:
        if path.name.lower().endswith((".nii", ".nii.gz", ".hdr")):
            return _nifti_problem(path)
        check_gzip(path)
        if path.name.lower().endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
            return length_problem(path, _n_bytes(header_of(path)))
    except (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        return f"damaged ({last_line(error)})"
    return None


def _nifti_problem(path: Path) -> str | None:
    """Why a NIfTI file is incomplete or has voxels that are not finite, or None. Reads the file once, in parts."""
    image: Any = nibabel.load(path)
    dtype, missing = image.get_data_dtype(), math.prod(image.shape)
    with nibabel.openers.ImageOpener(image.file_map["image"].filename) as file:
        file.read(image.dataobj.offset)
        while part := file.read((1 << 24) * dtype.itemsize):
            if len(part) > missing * dtype.itemsize:
                return "damaged (holds more voxels than its header promises)"
            voxels = np.frombuffer(part[: len(part) // dtype.itemsize * dtype.itemsize], dtype)
            missing -= len(voxels)
            if dtype.kind in "fc" and not np.isfinite(voxels).all():
                return NOT_FINITE
    return f"damaged (ends {missing} voxels early)" if missing > 0 else None


def check_gzip(path: Path) -> None:
    """Read a compressed file to its end, as SimpleITK says nothing where one is damaged. Other files pass unread.

    Raises OSError, EOFError or zlib.error where it ends early or has another checksum.
    """
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while file.read(1 << 24):
                pass


def write_image(image: sitk.Image, path: Path) -> None:
    """Write an image so that `path` holds all of it or what was there before. Raises OSError or RuntimeError."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        sitk.WriteImage(image, str(temporary), useCompression=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
