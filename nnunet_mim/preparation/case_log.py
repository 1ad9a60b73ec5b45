"""The log of a preparation: one line of JSON per case, so that a killed preparation can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import CaseName, Count, Positive, document
from nnunet_mim.preparation.finding import Volume
from nnunet_mim.pretraining.data.case_index import CaseInfo
from nnunet_mim.system.untrusted import MAX_LOG, limited, parse_json

UNREADABLE = ("cannot be", "damaged")
"""how reasons begin that say nothing about the image: its disk may be back at the next call"""
Entry = dict[str, Any]
"""case, key, files, images, and either reason (left out) or what `prepare_case` returns"""


class _Found(TypedDict):
    """What the entry of every case holds."""

    case: CaseName
    key: str
    files: Annotated[list[str], Field(min_length=1)]
    images: Annotated[list[str], Field(min_length=1)]
    slices: NotRequired[list[str]]
    """names of the files of a DICOM series, all in one folder"""


@document
class LeftOut(_Found):
    """The entry of a case that was left out."""

    reason: str
    same_as: NotRequired[str]
    image_sha256: NotRequired[str]


@document
class PreparedCase(_Found):
    """The entry of a preprocessed case."""

    image_sha256: str
    spacing: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    shape: Annotated[list[Count], Field(min_length=3, max_length=3)]
    sample: list[list[float]]
    histogram: list[int]
    info: dict[str, Any]
    stamps: list[list[int]] | None
    warnings: NotRequired[list[str]]


LEFT_OUT, PREPARED, INFO = TypeAdapter(LeftOut), TypeAdapter(PreparedCase), TypeAdapter(CaseInfo)


def _is_entry(entry: Any) -> bool:
    """Whether a line of the log holds what `CaseLog.add` has written."""
    try:
        if "reason" in entry:
            LEFT_OUT.validate_python(entry)
        else:
            PREPARED.validate_python(entry)
            INFO.validate_python(entry["info"] | {"image_sha256": ""})
            return entry["info"].keys() <= {one.name for one in fields(CaseInfo)}
    except (ValidationError, TypeError):
        return False
    return True


def is_result(result: Any) -> bool:
    """Whether a value is what `prepare_case` returns."""
    if not isinstance(result, dict) or "problem" in result:
        return isinstance(result, dict) and isinstance(result["problem"], str)
    return "reason" not in result and _is_entry({**result, "case": "a", "key": "", "files": ["a"], "images": ["a"]})


class CaseLog:
    """The last entry of every case. Only one process appends; a line that was cut short or changed does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        try:
            text = limited(path, MAX_LOG).decode("utf-8") if path.exists() else ""
        except (OSError, ValueError) as error:
            raise MiMError(f"cannot read {path} ({error}): restore it, or delete it to begin anew") from error
        for line in text.splitlines():
            try:
                entry = parse_json(line)
            except ValueError:
                continue
            if _is_entry(entry):
                self.entries[entry["case"]] = entry
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, entry: Entry) -> None:
        """Append an entry; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[entry["case"]] = entry

    def clear(self) -> None:
        """Delete all entries."""
        self.path.unlink(missing_ok=True)
        self.entries.clear()

    @property
    def prepared(self) -> dict[str, Entry]:
        """Entries of preprocessed cases, sorted by name."""
        return {case: entry for case, entry in sorted(self.entries.items()) if "reason" not in entry}

    @property
    def skipped(self) -> dict[str, Entry]:
        """Entries of cases that were left out, sorted by name."""
        return {case: entry for case, entry in sorted(self.entries.items()) if "reason" in entry}


def earlier_names(folder: Path) -> dict[str, str]:
    """Names of cases in all logs of a folder, by each file of the case; a prepared case goes before one left out."""
    logs = [CaseLog(path) for path in sorted(folder.glob("*.jsonl"))]
    entries = [entry for log in logs for entry in (*log.skipped.values(), *log.prepared.values())]
    names = {}
    for entry in sorted(entries, key=lambda entry: "reason" not in entry):
        names.update(dict.fromkeys((entry["files"][0], *_slices(entry)), entry["case"]))
    return names


def incomplete_series(volumes: Sequence[Volume], prepared: Mapping[str, Entry]) -> list[Volume]:
    """Volumes, in which a series cannot be read where one of the files cannot that it was prepared from.

    Without them it would be a shorter CT. Volumes of nothing but such files are left out. `prepared` are the entries of
    preprocessed cases, by name.
    """
    unreadable = {
        file for v in volumes if isinstance(v.header, str) and v.header.startswith(UNREADABLE) for file in v.files
    }
    found, lost_of_all = {}, set()
    for volume in volumes:
        entry = prepared.get(volume.name, {})
        if "slices" in entry:
            lost = unreadable.intersection(_slices(entry))
        else:  # an earlier version did not log the slices
            folders = {os.path.dirname(file) for file in entry.get("files", ()) if volume.series}
            lost = {file for file in unreadable if os.path.dirname(file) in folders}
        lost_of_all |= lost
        problem = f"cannot be read (slices that it was prepared from: {len(lost)}, such as {min(lost, default='')})"
        found[volume.name] = replace(volume, header=problem) if lost else volume
    return [v for v in found.values() if v.name in prepared or not lost_of_all.issuperset(v.files)]


def _slices(entry: Entry) -> list[str]:
    """Paths of the files of a DICOM series, as far as the log knows them."""
    return [os.path.join(os.path.dirname(entry["files"][0]), name) for name in entry.get("slices", ())]


def input_key(files: Sequence[str], settings: Any) -> str:
    """A hash of the size and time of all files and of the settings (plain values) that decide the result."""
    try:
        stamps = [[file, (status := os.stat(file)).st_size, status.st_mtime_ns] for file in files]
    except OSError as error:
        raise MiMError(f"cannot read {error.filename} ({error.strerror}): did it vanish just now?") from error
    return hashlib.sha256(json.dumps([stamps, settings]).encode()).hexdigest()[:16]
