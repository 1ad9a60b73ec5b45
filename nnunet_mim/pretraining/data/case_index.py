"""The case index: shape, hash, fingerprint, intensity range and body points of every case, read once and cached."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from nnunet_mim.checkpoint.fingerprint import FINGERPRINT_SHAPE, fingerprint, from_text, to_text
from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.nnunet.source import GONE, Source
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.machine import usable_cores
from nnunet_mim.system.progress import ProgressBar

N_BODY_POINTS = 64
BODY_HU = -500.0
INDEX_VERSION = 4
WITHOUT_FINGERPRINTS = 3
"""the version before; its cases are read once more"""


@dataclass(frozen=True)
class CaseInfo:
    """What a run knows of one case without opening it."""

    case: str
    shape: tuple[int, int, int]
    """voxels per axis, array order"""
    sha256: str
    """of the preprocessed voxels, see voxel_hash"""
    low: tuple[float, ...]
    """smallest normalised intensity per channel"""
    high: tuple[float, ...]
    body_points: tuple[tuple[int, int, int], ...]
    """voxels inside the body, spread at random; empty where everything is air"""
    image_sha256: str = ""
    """of the image's voxels as nnU-Net's reader gives them, where they were known; else empty"""
    fingerprint: str | None = None
    """as of `to_text`, empty where the case cannot be compared; None: not computed yet"""
    stamp: tuple[int, int] = field(default=GONE, compare=False)
    """size in bytes and time (ns) of the file when it was read; GONE: not known"""


@dataclass(frozen=True, eq=False)
class CaseIndex:
    """CaseInfo of many cases in a few arrays: 10,000 take 14 MB, and worker processes share the memory."""

    names: np.ndarray
    """(N,) str"""
    shapes: np.ndarray
    """(N, 3) int32"""
    hashes: np.ndarray
    """(N, 32) uint8"""
    ranges: np.ndarray
    """(N, 2, C) float64: smallest and largest intensity per channel"""
    points: np.ndarray
    """(N, N_BODY_POINTS, 3) int16; -1 where there is no body"""
    images: np.ndarray
    """(N, 32) uint8: hashes of the images; 0 where they are not known"""
    fingerprints: np.ndarray
    """(N, *FINGERPRINT_SHAPE) int8; 0 where a case cannot be compared"""
    stamps: np.ndarray
    """(N, 2) int64: size (bytes) and time (ns) of each file when it was read"""

    @classmethod
    def of(cls, infos: Sequence[CaseInfo], channels: int) -> CaseIndex:
        """From CaseInfos of cases with so many channels."""
        no_body = ((-1, -1, -1),) * N_BODY_POINTS
        return cls(
            np.array([i.case for i in infos], np.str_),
            np.array([i.shape for i in infos], np.int32).reshape(-1, 3),
            _bytes([i.sha256 for i in infos]),
            np.array([(i.low, i.high) for i in infos], np.float64).reshape(-1, 2, channels),
            np.array([i.body_points or no_body for i in infos], np.int16).reshape(-1, N_BODY_POINTS, 3),
            _bytes([i.image_sha256 for i in infos]),
            np.array([from_text(i.fingerprint) for i in infos], np.int8).reshape(-1, *FINGERPRINT_SHAPE),
            np.array([i.stamp for i in infos], np.int64).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> CaseInfo:
        points = self.points[number].tolist()
        return CaseInfo(
            str(self.names[number]),
            tuple(self.shapes[number].tolist()),
            self.hashes[number].tobytes().hex(),
            tuple(self.ranges[number, 0].tolist()),
            tuple(self.ranges[number, 1].tolist()),
            tuple(map(tuple, points)) if points[0][0] >= 0 else (),
            self.images[number].tobytes().hex() if self.images[number].any() else "",
            to_text(self.fingerprints[number]),
            tuple(self.stamps[number].tolist()),
        )

    def take(self, rows: Sequence[int] | np.ndarray) -> CaseIndex:
        """Some of the cases."""
        return CaseIndex(*(values[np.asarray(rows, np.int64)] for values in vars(self).values()))


def read_index(
    source: Source, show_progress: bool = True, remember_vanished: bool = False, trusted: bool = False
) -> tuple[CaseIndex, dict[str, str]]:
    """Describe all cases of a dataset, reading only those that are new or changed since the cached index was written.

    Args:
        source: dataset.
        show_progress: with a bar.
        remember_vanished: name cases that have vanished again the next time.
        trusted: cases that the index describes are not looked at; without it the size and time of each file are.

    Returns:
        the sound cases by name; and of those that cannot be read, are truncated, have other channels than the plans,
        hold NaN or infinity, or have vanished since the index was written, one line: file, what is wrong, remedy.
    """
    cached = _load_cache(source)
    row_of = {name: row for row, name in enumerate(cached.names.tolist())}
    vanished = sorted(row_of.keys() - set(source.cases))
    bad = {
        name: f"{source.case_file(name)} has vanished since the last run: run {source.preprocess_command}, or repeat "
        "the command to go on without it"
        for name in vanished
    }
    rows = {case: row_of[case] for case in source.cases if case in row_of}
    if trusted:
        is_described = (cached.stamps != GONE).any(axis=1)
        rows = {case: row for case, row in rows.items() if is_described[row]}
    else:
        rows = {case: row for case, row in rows.items() if (cached.stamps[row] == source.file_stamp(case)).all()}
    if len(rows) == len(cached) == len(source.cases):
        return cached, bad
    missing = [case for case in source.cases if case not in rows]
    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        described = pool.map(lambda case: _describe_case(source, case), missing)
        title = f"checking {source.dataset}"
        bar = ProgressBar(described, total=len(missing), desc=title, unit="case", disable=not show_progress)
        results = dict(zip(missing, bar, strict=True))
    sound = []
    for case, result in results.items():
        if isinstance(result, str):
            bad[case] = result
            continue
        if case in row_of and cached[row_of[case]].sha256 == result.sha256:  # copied or unpacked anew: the same image
            result = replace(result, image_sha256=cached[row_of[case]].image_sha256)
        sound.append(result)
    index = _sorted(cached.take(list(rows.values())), CaseIndex.of(sound, source.in_channels))
    known = _sorted(index, cached.take([row_of[name] for name in vanished])) if remember_vanished else index
    _save_cache(source, known)
    return index, bad


def write_index(source: Source, infos: Sequence[CaseInfo]) -> None:
    """Keep what is known already of a dataset's cases, so that `read_index` need not read them."""
    stamped = [
        replace(info, stamp=GONE if info.fingerprint is None else source.file_stamp(info.case)) for info in infos
    ]
    _save_cache(source, _sorted(CaseIndex.of(stamped, source.in_channels)))


def _describe_case(source: Source, case: str) -> CaseInfo | str:
    """Read one case completely and describe it, or say why it cannot be trained on."""
    path, stamp = source.case_file(case), source.file_stamp(case)
    try:
        data = np.asarray(source.dataset_class(str(source.folder), [case]).load_case(case)[0][:])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"cannot read {path} ({type(error).__name__}: {reason}): {remedy(source, case)}"
    if data.ndim != 4 or data.shape[0] != source.in_channels:
        shape = f"{data.shape} (channels, then the plans' axes)"
        return f"{path} has shape {shape}, the plans say {source.in_channels} channels: {remedy(source, case)}"
    if not np.isfinite(data).all():
        return f"{path} holds NaN or infinite voxels: correct the image, then {remedy(source, case)}"
    return replace(describe_voxels(source, case, data), stamp=stamp)


def describe_voxels(source: Source, case: str, data: np.ndarray) -> CaseInfo:
    """Describe preprocessed voxels (C, X, Y, Z), all finite."""
    return CaseInfo(
        case,
        tuple(int(n) for n in data.shape[1:]),  # type: ignore[arg-type]
        voxel_sha256(data),
        tuple(float(c.min()) for c in data),
        tuple(float(c.max()) for c in data),
        _body_points(data[0], _body_threshold(source)),
        fingerprint=to_text(fingerprint(data, source.intensities, source.spacing)),
    )


def remedy(source: Source, case: str) -> str:
    """What to do about a case that cannot be used."""
    return f"run {source.preprocess_command}, or move the files of '{case}' out of the folder"


def _body_threshold(source: Source) -> float:
    """Normalised intensity above which a voxel of channel 0 is body: BODY_HU, or just above the window's minimum."""
    window = source.intensities.normalized_window()
    if window is None:
        return -np.inf
    std, mean = source.intensities.scale()
    return max((BODY_HU - mean) / std, window[0] + 0.01 * (window[1] - window[0]))


def _bytes(hashes: Sequence[str]) -> np.ndarray:
    """(N, 32) uint8 of hexadecimal digits; 0 for none."""
    return np.array([list(bytes.fromhex(h or "00" * 32)) for h in hashes], np.uint8).reshape(-1, 32)


def _body_points(volume: np.ndarray, threshold: float) -> tuple[tuple[int, int, int], ...]:
    inside = np.flatnonzero(volume > threshold)
    if inside.size == 0:
        return ()
    chosen = np.random.default_rng(0).choice(inside, size=N_BODY_POINTS)
    return tuple(zip(*(axis.tolist() for axis in np.unravel_index(chosen, volume.shape)), strict=True))  # type: ignore[arg-type]


def _sorted(*parts: CaseIndex) -> CaseIndex:
    joined = CaseIndex(
        *(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True))
    )
    return joined.take(np.argsort(joined.names, kind="stable"))


def _load_cache(source: Source) -> CaseIndex:
    """The index as it was written; empty where there is none."""
    try:
        with np.load(source.index_file, allow_pickle=False) as stored:
            values, version = dict(stored), int(stored["version"])
            if version == WITHOUT_FINGERPRINTS:  # what only the index knows, the hashes of the images, is kept
                values["fingerprints"] = np.zeros((len(values["names"]), *FINGERPRINT_SHAPE), np.int8)
                values["stamps"] = np.full_like(values["stamps"], GONE)
            index = CaseIndex(*(values[name] for name in CaseIndex.__dataclass_fields__))
            if version in (WITHOUT_FINGERPRINTS, INDEX_VERSION) and index.ranges.shape[2] == source.in_channels:
                return index
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return CaseIndex.of([], source.in_channels)


def _save_cache(source: Source, index: CaseIndex) -> None:
    path = source.index_file
    content = io.BytesIO()
    np.savez(content, version=INDEX_VERSION, **vars(index))
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        print(f"note: the case index could not be cached in {path.parent} ({error.strerror}): made anew next time")
