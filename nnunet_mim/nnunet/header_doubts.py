"""What a header says about geometry, read a second time without SimpleITK, which takes defaults without a word."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

RIGHT_ANGLE, SAME = 1e-2, 1e-2
"""cosine of two axes, and share of a voxel, that come from rounding"""
NIFTI = (".nii", ".nii.gz", ".hdr")
UNITS = {1: "meter", 3: "micron"}
LPS = np.diag([-1.0, -1.0, 1.0])
NRRD_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1), "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip


def are_right_angles(direction: tuple[float, ...]) -> bool:
    """Whether axes of these direction cosines are orthogonal, each of length 1."""
    n = round(len(direction) ** 0.5)
    columns = np.reshape(direction, (n, n))
    return bool(np.allclose(columns.T @ columns, np.eye(n), rtol=0, atol=RIGHT_ANGLE))


def header_doubts(path: str, size: tuple[int, ...], steps: np.ndarray) -> tuple[str, ...]:
    """What is doubtful about the header of a 3-D image file, a sentence each.

    Args:
        size: voxels along x, y, z, as SimpleITK reads it.
        steps: (3, 3) mm, column i: from one voxel to the next along axis i, as SimpleITK reads it.
    """
    name = path.lower()
    if name.endswith(NIFTI):
        return tuple(_nifti_doubts(path, steps))
    if name.endswith((".mha", ".mhd")):
        return tuple(_text_doubts(_meta_fields(path), ("DimSize", "ElementSpacing", "TransformMatrix"), size, steps))
    if name.endswith((".nrrd", ".nhdr")):
        return tuple(_text_doubts(_nrrd_fields(path), ("sizes", "space directions", "space"), size, steps))
    return ()


def nifti_problem(path: str) -> str:
    """Why the geometry in the header of a NIfTI file cannot be used, or nothing; of other files nothing.

    It is read from the bytes: SimpleITK and nibabel take 1 mm for a spacing of 0 or NaN without a word.
    """
    if not path.lower().endswith(NIFTI):
        return ""
    header = _nifti_header(path)
    if header["magic"].item() not in (b"n+1", b"ni1"):
        return "damaged (its header is not that of NIfTI)"
    rows, has_sform = header.get_sform(), header["sform_code"] > 0
    origin = rows[:3, 3] if has_sform else [header[f"qoffset_{axis}"] for axis in "xyz"]
    quaternion = np.array([header[f"quatern_{part}"] for part in "bcd"], float)
    for spacing in (header["pixdim"][1:4], *([np.linalg.norm(rows[:3, :3], axis=0)] if has_sform else ())):
        if not (np.isfinite(spacing) & (spacing > 0)).all():
            return f"implausible spacing ({', '.join(f'{s:g}' for s in spacing)} mm)"
    if header["qform_code"] > 0 and not (quaternion**2).sum() <= 1 + header.quaternion_threshold:
        return "its qform is no rotation"
    is_placed = has_sform or header["qform_code"] > 0
    return "its origin is not finite" if is_placed and not np.isfinite(origin).all() else ""


def _nifti_header(path: str) -> Any:
    """The fields of a NIfTI header as they are in the file; `nibabel.load` mends them."""
    with nibabel.openers.ImageOpener(path) as file:
        return nibabel.Nifti1Header(file.read(nibabel.Nifti1Header.template_dtype.itemsize), check=False)


def _nifti_doubts(path: str, steps: np.ndarray) -> list[str]:
    header = _nifti_header(path)
    has_sform, has_qform = header["sform_code"] > 0, header["qform_code"] > 0
    if not has_sform and not has_qform:
        return ["its header says no orientation (neither qform nor sform)"]
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # by the standard
    qform: Any = header.get_qform() if has_qform else None
    affine = header.get_sform() if has_sform else qform
    found = []
    if has_sform and qform is not None and not _same(affine[:3, :3], qform[:3, :3]):
        found.append("its qform and its sform say different geometries")
    if not _same(LPS @ affine[:3, :3], steps):
        found.append("SimpleITK and nibabel read different geometries")
    elif not np.allclose(header["pixdim"][1:4], np.linalg.norm(steps, axis=0), rtol=SAME):
        found.append("its pixdim says another spacing than its affine")
    unit = int(header["xyzt_units"]) % 8
    if unit not in (0, 2):  # not said, or mm
        found.append(f"its lengths are given in {UNITS.get(unit, f'an unknown unit ({unit})')}")
    return found


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.allclose(one, other, rtol=0, atol=SAME * np.linalg.norm(other, axis=0).min()))


def _text_doubts(
    fields: list[tuple[str, str]], wanted: tuple[str, ...], size: tuple[int, ...], steps: np.ndarray
) -> list[str]:
    """Doubts about the fields (name, value) of a MetaImage or NRRD header."""
    counts = Counter(name for name, _ in fields)
    if repeated := [name for name, n in counts.items() if n > 1]:
        return [f"its header says {repeated[0]} more than once"]
    values = dict(fields)
    if missing := [name for name in wanted if name not in values]:
        return [f"its header says no {missing[0]}, for which a default is taken"]
    try:
        if "DimSize" in values:
            cosines = np.array(values["TransformMatrix"].split(), float).reshape(3, 3).T
            own = cosines * np.array(values["ElementSpacing"].split(), float)
            own_size = values["DimSize"]
        else:
            vectors = values["space directions"].replace("(", "").replace(")", "").replace(",", " ").split()
            own = np.diag(NRRD_SPACES[values["space"].lower()]) @ np.array(vectors, float).reshape(3, 3).T
            own_size = values["sizes"]
        same = _same(own, steps) and [int(n) for n in own_size.split()] == list(size)
    except (ValueError, KeyError):
        same = False
    return [] if same else ["its header is read by SimpleITK as something else than it says"]


def length_problem(path: Path, n_bytes: int) -> str | None:
    """Why a MetaImage or NRRD file, or the one that its header names, has not `n_bytes` bytes of voxels, or None.

    In encodings that are not known it is None. SimpleITK says nothing of bytes that are left over: a smaller size in
    the header shears the image.
    """
    is_meta = path.suffix.lower() in (".mha", ".mhd")
    fields = dict(_meta_fields(str(path)) if is_meta else _nrrd_fields(str(path)))
    end = b"LOCAL\n" if is_meta else b"\n\n"
    name = fields.get("ElementDataFile", "LOCAL") if is_meta else fields.get("data file", "LOCAL")
    voxels = path if name == "LOCAL" else path.parent / name
    compressed = fields.get("CompressedData", "").lower() == "true" or fields.get("encoding") in ("gzip", "gz")
    known = fields.get("encoding", "raw") in ("raw", "gzip", "gz") and voxels.is_file()  # and not a list of files
    if not known or fields.keys() & {"HeaderSize", "byte skip", "line skip"}:
        return None
    with voxels.open("rb") as file:
        if name == "LOCAL":
            head = file.read(1 << 16)
            if end not in head:
                return None
            file.seek(head.index(end) + len(end))
        inflate, left = zlib.decompressobj(47), n_bytes  # 47: zlib or gzip, by its first bytes
        while part := file.read(1 << 20):
            left -= len(inflate.decompress(part)) if compressed else len(part)
    if left:
        return f"damaged ({abs(left)} bytes of voxels {'fewer' if left > 0 else 'more'} than its header promises)"
    return None


def _meta_fields(path: str) -> list[tuple[str, str]]:
    fields = []
    for line in _lines(path):
        name, _, value = line.partition("=")
        fields.append((name.strip(), value.strip()))
        if fields[-1][0] == "ElementDataFile":
            break
    return fields


def _nrrd_fields(path: str) -> list[tuple[str, str]]:
    fields = []
    for line in _lines(path)[1:]:
        if not line.strip():
            break
        name, colon, value = line.partition(": ")
        if colon and not line.startswith("#"):
            fields.append((name.strip().lower(), value.strip()))
    return fields


def _lines(path: str) -> list[str]:
    with Path(path).open("rb") as file:
        return [line.rstrip("\r") for line in file.read(1 << 16).decode("latin-1").split("\n")]
