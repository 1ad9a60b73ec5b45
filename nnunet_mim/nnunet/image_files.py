"""Files of medical images: endings, case names, headers, damage."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import SimpleITK as sitk

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")


def case_name(path: Path) -> str:
    """File name without its ending and without _0000, nnU-Net's first channel."""
    name = next((path.name[: -len(e)] for e in ENDINGS if path.name.lower().endswith(e)), path.stem)
    return name.removesuffix("_0000") or name


def header_of(path: str | Path) -> sitk.ImageFileReader:
    """A reader that has read the header of an image file. Raises RuntimeError where SimpleITK cannot."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


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
