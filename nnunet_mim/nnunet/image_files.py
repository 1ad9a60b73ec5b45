"""Files of medical images: which endings, which name for a case, whether a compressed file is whole."""

from __future__ import annotations

import gzip
from pathlib import Path

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")


def case_name(path: Path) -> str:
    """File name without its ending and nnU-Net's channel number."""
    name = next((path.name[: -len(e)] for e in ENDINGS if path.name.lower().endswith(e)), path.stem)
    return name.removesuffix("_0000") or name


def check_gzip(path: Path) -> None:
    """Raise an error for a compressed file that ends early or has another checksum: SimpleITK fills up with zeros.

    Files that are not compressed pass unread.

    Raises:
        OSError, EOFError, zlib.error: it is damaged.
    """
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while file.read(1 << 24):
                pass
