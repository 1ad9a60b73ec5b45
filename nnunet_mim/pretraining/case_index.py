"""The case index: shape, content hash, intensity range and body points of every case, read once and cached."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.sources import Source
from nnunet_mim.voxel_hash import voxel_sha256

N_BODY_POINTS = 64
BODY_HU = -500.0
INDEX_VERSION = 1


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


def read_index(source: Source, n_threads: int | None = None, show_progress: bool = True) -> list[CaseInfo]:
    """Describe all cases of a dataset, reading only those that are new or changed since the cached index was written.

    Raises:
        MiMError: cases that cannot be read, are truncated, have other channels than the plans, or hold NaN or infinity.
            What was learned of the sound ones is kept.
    """
    cached = _load_cache(source.index_file)
    infos: dict[str, CaseInfo] = {}
    stamps = {case: _stamp(source.case_file(case)) for case in source.cases}
    for case in source.cases:
        entry = cached.get(case)
        if entry is not None and entry["stamp"] == stamps[case]:
            infos[case] = _from_json(entry["info"])
    missing = [case for case in source.cases if case not in infos]
    if missing:
        with ThreadPoolExecutor(n_threads or min(8, os.cpu_count() or 1)) as pool:
            described = pool.map(lambda case: _describe_or_error(source, case), missing)
            progress = tqdm(described, total=len(missing), desc=f"checking {source.dataset}", disable=not show_progress)
            results = dict(zip(missing, progress, strict=True))
        infos |= {case: result for case, result in results.items() if isinstance(result, CaseInfo)}
        _save_cache(source.index_file, {c: {"stamp": stamps[c], "info": asdict(info)} for c, info in infos.items()})
        errors = {case: result for case, result in results.items() if isinstance(result, MiMError)}
        if errors:
            first, *others = errors
            more = f" ({len(others)} more cases cannot be used: {', '.join(others)})" if others else ""
            raise MiMError(f"{errors[first]}{more}") from errors[first]
    return [infos[case] for case in source.cases]


def _describe_or_error(source: Source, case: str) -> CaseInfo | MiMError:
    try:
        return describe_case(source, case)
    except MiMError as error:
        return error


def describe_case(source: Source, case: str) -> CaseInfo:
    """Read one case completely and describe it. Errors as in `read_index`."""
    path = source.case_file(case)
    remedy = f"preprocess {source.dataset} again, or move the files of '{case}' out of the folder"
    try:
        data = np.asarray(source.dataset_class(str(source.folder), [case]).load_case(case)[0][:])
    except Exception as error:
        raise MiMError(f"cannot read {path} ({type(error).__name__}: {_one_line(error)}): {remedy}") from error
    if data.ndim != 4 or data.shape[0] != source.in_channels:
        raise MiMError(f"{path} has shape {data.shape}, the plans say {source.in_channels} channels: {remedy}")
    if not np.isfinite(data).all():
        raise MiMError(f"{path} holds NaN or infinite voxels: correct the image, then {remedy}")
    return CaseInfo(
        case,
        tuple(int(n) for n in data.shape[1:]),  # type: ignore[arg-type]
        voxel_sha256(data),
        tuple(float(c.min()) for c in data),
        tuple(float(c.max()) for c in data),
        _body_points(data[0], body_threshold(source)),
    )


def body_threshold(source: Source) -> float:
    """Normalised intensity above which a voxel of channel 0 counts as body: -500 HU, or just above the window's
    minimum.
    """
    window = source.window(0)
    if window is None:
        return -np.inf
    std, mean = source.to_hounsfield(0)
    return max((BODY_HU - mean) / std, window[0] + 0.01 * (window[1] - window[0]))


def _body_points(volume: np.ndarray, threshold: float) -> tuple[tuple[int, int, int], ...]:
    inside = np.flatnonzero(volume > threshold)
    if inside.size == 0:
        return ()
    chosen = np.random.default_rng(0).choice(inside, size=N_BODY_POINTS)
    points = np.stack(np.unravel_index(chosen, volume.shape), axis=-1)
    return tuple(tuple(int(v) for v in point) for point in points)  # type: ignore[misc]


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise MiMError(f"cannot read {path} ({error.strerror}): preprocess the dataset again") from error
    return [status.st_size, status.st_mtime_ns]


def _load_cache(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stored["cases"] if isinstance(stored, dict) and stored.get("version") == INDEX_VERSION else {}


def _save_cache(path: Path, entries: dict) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"version": INDEX_VERSION, "cases": entries}))
        os.replace(temporary, path)
    except OSError as error:
        print(
            f"note: the case index could not be cached in {path.parent} ({error.strerror}); it is made anew next time"
        )


def _from_json(info: dict) -> CaseInfo:
    return CaseInfo(
        info["case"], tuple(info["shape"]), info["sha256"], tuple(info["low"]), tuple(info["high"]),
        tuple(tuple(point) for point in info["body_points"]),
    )  # fmt: skip


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
