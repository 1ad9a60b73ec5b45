"""What the header of one DICOM file says, and where GDCM takes a default or a guess for it without a word."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from nnunet_mim.errors import printable

MODALITY, IMAGE_TYPE, INTERCEPT, POSITION, ORIENTATION = "0008|0060", "0008|0008", "0028|1052", "0020|0032", "0020|0037"
SERIES, INSTANCE = "0020|000e", "0008|0018"
ACQUISITION, PHASE, TRIGGER, TIME = "0020|0012", "0020|0100", "0018|1060", "0008|0032"
SLOPE, SPACING, GREY = "0028|1053", "0028|0030", "0028|0004"
CLASS, CT_CLASS = "0008|0016", "1.2.840.10008.5.1.4.1.1.2"
ALLOCATED, STORED, HIGH_BIT, SIGNED = "0028|0100", "0028|0101", "0028|0102", "0028|0103"
TAGS = (
    MODALITY, IMAGE_TYPE, INTERCEPT, POSITION, ORIENTATION, SERIES, INSTANCE, ACQUISITION, PHASE, TRIGGER, TIME, SLOPE,
    SPACING, GREY, CLASS, ALLOCATED, STORED, HIGH_BIT, SIGNED,
)  # fmt: skip
"""that are kept"""
DEFAULTED = {
    SLOPE: "rescale slope", GREY: "photometric interpretation", STORED: "bits stored", HIGH_BIT: "high bit",
    SIGNED: "pixel representation",
}  # fmt: skip
"""what a CT has to say, and is read without"""
UNCOMPRESSED = (b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1")
"""transfer syntaxes of plain pixels, the low byte first"""


def tags_of(reader: sitk.ImageFileReader) -> dict[str, str]:
    """Those of TAGS that a header has, as texts that can be printed and stored, whatever bytes they are."""
    found = {tag: reader.GetMetaData(tag).strip(" \0\n") for tag in TAGS if reader.HasMetaDataKey(tag)}
    return {tag: printable(text, None) for tag, text in found.items()}


def numbers(text: str, n: int) -> tuple[float, ...]:
    """The n finite numbers of a value of DICOM; empty where it is something else."""
    try:
        values = tuple(float(value) for value in text.split("\\"))
    except ValueError:
        return ()
    return values if len(values) == n and all(map(math.isfinite, values)) else ()


def rescale_problem(tags: Mapping[str, str]) -> str | None:
    """Why the stored values of a file do not become Hounsfield units, or None."""
    if not tags.get(INTERCEPT):
        return "no HU (no rescale intercept in the DICOM header)"
    if not numbers(tags[INTERCEPT], 1):
        return f"no HU (the rescale intercept in the DICOM header is {printable(tags[INTERCEPT], 20)})"
    if SLOPE in tags and not any(slope > 0 for slope in numbers(tags[SLOPE], 1)):
        return f"no HU (the rescale slope in the DICOM header is {printable(tags[SLOPE], 20) or 'empty'})"
    if tags.get(GREY) == "MONOCHROME1":
        return "no HU (MONOCHROME1, grey values from white to black)"
    return None


def geometry_problem(tags: Mapping[str, str], reader: sitk.ImageFileReader) -> str | None:
    """Why a file with a single slice has no size of its pixels or no direction that GDCM reads as it is said, or None.

    GDCM takes 1 mm where there is no size, and for classes of DICOM that it does not know.
    """
    said = numbers(tags.get(SPACING, ""), 2)
    if not said or min(said) <= 0 or not np.allclose(said[::-1], reader.GetSpacing()[:2], rtol=1e-3, atol=0):
        shown = printable(tags.get(SPACING, ""), 20) or "there is none"
        return f"no usable pixel spacing in the DICOM header ({shown})"
    turn = numbers(tags.get(ORIENTATION, ""), 6)
    read = np.reshape(reader.GetDirection(), (3, 3))[:, :2].T.ravel()
    if turn and not np.allclose(turn, read, rtol=0, atol=1e-2):
        return f"no usable orientation in the DICOM header ({printable(tags[ORIENTATION], 40)})"
    return None


def pixel_doubts(tags: Mapping[str, str]) -> tuple[str, ...]:
    """What is doubtful about what a file with a single slice is, and how it stores its pixels, a sentence each."""
    if missing := [name for tag, name in DEFAULTED.items() if not tags.get(tag)]:
        return (f"its DICOM header says no {missing[0]}, for which a default is taken",)
    if not f"{tags.get(CLASS) or CT_CLASS}.".startswith(f"{CT_CLASS}."):
        return (f"its class is not that of a CT ({printable(tags[CLASS], 40)})",)
    allocated, stored, high, signed = (numbers(tags.get(tag, ""), 1) for tag in (ALLOCATED, STORED, HIGH_BIT, SIGNED))
    if allocated and stored and 0 < stored[0] <= allocated[0] and high == (stored[0] - 1,) and signed in ((0,), (1,)):
        return ()
    bits = ", ".join(f"{printable(tags.get(tag, ''), 20)}" for tag in (ALLOCATED, STORED, HIGH_BIT, SIGNED))
    return (f"its bits do not fit each other (allocated, stored, high bit, pixel representation: {bits})",)


def pixels_problem(path: str, head: bytes, n_pixels: int, tags: Mapping[str, str]) -> str | None:
    """Why a grey DICOM file with these first bytes has not as many pixels as its header promises, or None.

    GDCM cuts off what is left over, which shears an image whose number of columns is wrong. The length of the pixels is
    looked for as bytes, in files that are not compressed.
    """
    syntax = re.search(rb"\x02\x00\x10\x00UI..([0-9.]+)", head, re.DOTALL)
    bits = numbers(tags.get(ALLOCATED, ""), 1)
    if not bits or (syntax and syntax[1] not in UNCOMPRESSED):
        return None
    promised = math.ceil(n_pixels * bits[0] / 8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        elements = re.finditer(rb"\xe0\x7f\x10\x00(?:O[BW]\x00\x00)?(.{4})", content, re.DOTALL)
        lengths = [min(int.from_bytes(found[1], "little"), len(content) - found.end()) for found in elements]
    if not lengths or {promised, promised + promised % 2} & {*lengths}:
        return None
    return f"damaged (its header promises {promised} bytes of pixels, the file has {lengths[-1]})"
