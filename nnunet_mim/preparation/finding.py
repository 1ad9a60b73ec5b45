"""Image files and DICOM series in a user's folders, nested at any depth."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.dicom import series_of
from nnunet_mim.nnunet.image_files import (
    DICOM_ENDINGS,
    ENDINGS,
    FileHeader,
    case_name,
    file_problem,
    printable,
    read_headers,
)

HIDDEN = "a hidden folder with images: rename it, or name it with -i"


@dataclass(frozen=True)
class Volume:
    """One image as it lies in the user's folders, of which only the header has been read."""

    name: str
    """name of the case: letters, digits, - and _"""
    files: tuple[str, ...]
    """absolute paths: one image file, or the slices of a DICOM series in their order"""
    series: str = ""
    """SeriesInstanceUID; empty for an image file"""
    header: FileHeader | str = ""
    """or why the files cannot be read or hold no image"""


def find_volumes(
    folders: Sequence[Path], earlier_names: dict[str, str] | None = None, processes: int = 1
) -> list[Volume]:
    """All image files and DICOM series in folders, sorted by name.

    Folders are searched to any depth, links included; some archives hide files (`.IM0001`). Hidden folders are named
    where they hold images, and not searched: what has been deleted or is a copy may lie there.
    Every header is read in one of some worker processes. A name is the path below the folder in letters, digits, - and
    _; a second one of the same name gets a number. Names from earlier calls, given by the files of each volume, are
    kept: of a series also where some of its slices have come or gone.
    """
    earlier_names = earlier_names or {}
    taken, used = set(earlier_names.values()), set()
    volumes = []
    for folder in folders:
        if not folder.is_dir():
            raise MiMError(f"-i {folder} is not a folder: give folders with CT (NIfTI, NRRD, MHA, DICOM)")
        for stem, found in _found(folder.resolve(), processes, earlier_names):
            earlier = Counter(earlier_names[file] for file in found.files if file in earlier_names)
            name = next((name for name, _ in earlier.most_common() if name not in used), None) or _new_name(stem, taken)
            taken.add(name)
            used.add(name)
            volumes.append(replace(found, name=name))
    if not volumes:
        raise MiMError(f"no image in {', '.join(map(str, folders))}: give folders with NIfTI, NRRD, MHA or DICOM files")
    unique = {volume.files: volume for volume in reversed(volumes)}  # a folder inside another one of -i
    return sorted(unique.values(), key=lambda volume: volume.name)


def _found(root: Path, processes: int, known: Collection[str]) -> Iterator[tuple[str, Volume]]:
    """(path below the root, volume without a name) of every volume, sorted by folder."""
    paths = [path for folder in _files(root, known) for path in folder]
    headers = dict(zip(paths, read_headers(paths, processes, f"looking into {root.name}"), strict=True))
    for folder, files in groupby(headers, os.path.dirname):
        relative = Path(folder).relative_to(root)
        dicom = {}
        for path in files:
            header = headers[path]
            if header is not None and path.lower().endswith(ENDINGS):
                stem = (relative / case_name(Path(path))).as_posix()
                yield printable(stem), Volume("", (printable(path),), header=header)
            elif header is not None:
                dicom[path] = header
        yield from _series(printable(relative.as_posix() if relative.parts else root.name), dicom)
    for folder in _hidden_folders(root):
        stem = printable(Path(folder).relative_to(root).as_posix())
        yield stem, Volume("", (printable(folder),), header=HIDDEN)


def _files(root: Path, known: Collection[str]) -> Iterator[list[str]]:
    """Paths of the files in each folder that may be images; known ones were images in an earlier call."""

    def stop(error: OSError) -> None:
        raise MiMError(f"cannot look into {error.filename} ({error.strerror}): make it readable, or move it away")

    visited = set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=stop):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (real := os.path.realpath(folder)) in visited:
            below[:] = []
            continue
        visited.add(real)
        paths = [os.path.join(folder, name) for name in sorted(files) if not name.startswith("._")]  # macOS's own
        endings = (*ENDINGS, *DICOM_ENDINGS)
        yield [path for path in paths if path.lower().endswith(endings) or path in known or not file_problem(path)]


def _hidden_folders(root: Path) -> Iterator[str]:
    """Hidden folders, themselves in none, with a file that is an image by its name or its preamble."""
    for folder, below, _ in os.walk(root):
        for name in sorted(name for name in below if name.startswith(".")):
            path = os.path.join(folder, name)
            files = (os.path.join(inside, file) for inside, _, files in os.walk(path) for file in sorted(files))
            if any(_may_be_image(file) for file in files):
                yield path
        below[:] = sorted(name for name in below if not name.startswith("."))


def _may_be_image(path: str) -> bool:
    if os.path.basename(path).startswith("._") or file_problem(path):
        return False
    if path.lower().endswith((*ENDINGS, *DICOM_ENDINGS)):
        return True
    with suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def _series(stem: str, dicom: Mapping[str, FileHeader | str]) -> Iterator[tuple[str, Volume]]:
    """The DICOM series of one folder, slices sorted by position; and its DICOM files that belong to none."""
    by_uid = series_of({path: header for path, header in dicom.items() if isinstance(header, FileHeader)})
    unreadable = defaultdict(list)
    for path, header in dicom.items():
        if isinstance(header, str):
            unreadable[header].append(printable(path))
    damaged = sum(len(files) for problem, files in unreadable.items() if not problem.startswith("no image"))
    warnings = (f"its folder holds DICOM files that cannot be read ({damaged})",) if damaged else ()
    for parts in by_uid:
        name = f"{stem}_{hashlib.sha256(parts[0].uid.encode()).hexdigest()[:8]}" if len(by_uid) > 1 else stem
        for number, part in enumerate(parts, start=1):
            header = replace(part.header, warnings=(*part.header.warnings, *warnings))
            yield f"{name}_{number}" if number > 1 else name, Volume("", part.files, part.uid or "none", header)
    for problem, files in unreadable.items():
        more = f", and so are {len(files) - 1} more files of this folder" if len(files) > 1 else ""
        yield f"{stem}_unreadable", Volume("", tuple(files), header=f"{problem}{more}")


def _new_name(stem: str, taken: set[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_") or "case"
    if name.endswith("_seg"):  # nnU-Net keeps the segmentation of case X in X_seg
        name += "_image"
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique
