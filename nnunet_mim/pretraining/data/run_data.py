"""The cases of a run: checked, described, and split into those to train on and those held out."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy

from nnunet_mim.config import FLAT_FRACTION, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import Source
from nnunet_mim.nnunet.splits import fold_validation_cases
from nnunet_mim.pretraining.data.case_index import read_index, remedy
from nnunet_mim.pretraining.data.crops import Cases
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.machine import usable_cores


@dataclass(frozen=True)
class RunData:
    """What a run trains on, and the intensities that the losses need."""

    sources: list[Source]
    train: Cases
    val: Cases
    fold: int | str
    fill: tuple[float, ...]
    """per channel, the window's minimum"""
    flat_threshold: tuple[float, ...]
    """per channel, standard deviation below which a token is no target"""
    width: tuple[float, ...]
    """per channel, the window's largest minus its smallest intensity"""


def index_sources(sources: Sequence[Source], strict: bool = False) -> tuple[Cases, list[str]]:
    """Check and describe every case of every dataset; `.npz` cases are unpacked first so that crops can be read.

    Returns:
        the cases that can be used, and one line for each that cannot.

    Raises:
        MiMError: `strict`, and there is one that cannot be used; or there is none that can.
    """
    indexes, bad = [], []
    for source in sources:
        damaged = {}
        if issubclass(source.dataset_class, nnUNetDatasetNumpy):
            damaged = unpack(source)
        index, found = read_index(source, remember_vanished=strict)
        indexes.append(index)
        bad += [f"{source.dataset} {case.case}: {damaged.get(case.case, case.problem)}" for case in found]
    if bad and strict:
        more = f" ({len(bad) - 1} more cases cannot be used: {', '.join(b.split(':')[0] for b in bad[1:])})"
        raise MiMError(f"{bad[0]}{more if bad[1:] else ''}")
    cases = Cases(sources, indexes)
    if not len(cases):
        raise MiMError(f"no case can be used: {bad[0]}")
    return cases, bad


def unpack(source: Source) -> dict[str, str]:
    """Unpack `.npz` cases that are not yet. Returns what is wrong with damaged ones, which are left as they are."""
    damaged = {}
    for case in source.cases:
        try:
            check_npz(source, case)
        except MiMError as error:
            damaged[case] = str(error)
    if not damaged:
        source.dataset_class.unpack_dataset(str(source.folder), False, max(1, usable_cores() // 2), True)
        return {}
    for case in source.cases:
        file = source.folder / f"{case}.npy"
        if case not in damaged and not file.is_file():
            try:
                with np.load(source.folder / f"{case}.npz") as archive:
                    for name, part in ((f"{case}_seg.npy", "seg"), (f"{case}.npy", "data")):
                        content = io.BytesIO()
                        np.save(content, archive[part])
                        write_atomically(source.folder / name, content.getvalue())
            except (KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
                damaged[case] = f"cannot read {source.folder / case}.npz ({error}): {remedy(source, case)}"
    return damaged


def check_npz(source: Source, case: str) -> None:
    """Raise MiMError for an `.npz` that is damaged: unpacking it would fail without naming it."""
    path = source.folder / f"{case}.npz"
    try:
        with np.load(path) as archive:
            _ = archive["data"].shape
    except Exception as error:
        raise MiMError(
            f"cannot read {path} ({type(error).__name__}: {error}): preprocess {source.dataset} again, or move it away"
        ) from error


def split_cases(cases: Cases, fold: int | str, config: PretrainConfig) -> tuple[Cases, Cases]:
    """Training cases, and the held-out ones that the loss is measured on.

    With a fold, its validation cases of nnU-Net's own split are held out of every labelled dataset. Of a dataset
    without labels, and of all where there is no fold, `config.val_cases` cases (at most a tenth, at least one) are held
    out at random. Content never appears on both sides.

    Raises:
        MiMError: too few cases, or a fold and no labels anywhere.
    """
    held_out, any_split = [], False
    for number, source in enumerate(cases.sources):
        rows = np.flatnonzero(cases.numbers[:, 0] == number)
        names = cases.indexes[number].names[cases.numbers[rows, 1]]
        chosen = fold_validation_cases(source, int(fold)) if fold != "all" else ()
        any_split = any_split or bool(chosen)
        if chosen:
            held_out.append(rows[np.isin(names, chosen)])
        else:
            count = max(1, min(config.val_cases, len(rows) // 10)) if len(rows) > 1 else 0
            held_out.append(np.random.default_rng(config.seed).permutation(rows)[:count])
    if fold != "all" and not any_split:
        raise MiMError(f"-f {fold}: none of the datasets has labels, so there is no split; leave out -f")
    is_held_out = np.zeros(len(cases), bool)
    is_held_out[np.concatenate(held_out)] = True
    hashes = [row.tobytes() for row in cases.column("hashes")]
    seen = {hashes[i] for i in np.flatnonzero(is_held_out)}
    known_there = np.array([hash_ in seen for hash_ in hashes], bool)
    train, val = cases.take(np.flatnonzero(~known_there)), cases.take(np.flatnonzero(is_held_out))
    if not len(train) or not len(val):
        raise MiMError(f"{len(cases)} cases are too few: pretraining needs at least one to train on and one held out")
    return train, val


def run_data(cases: Cases, fold: int | str, config: PretrainConfig) -> RunData:
    """Cases, and the intensities that padding and the flat-token rule need."""
    train, val = split_cases(cases, fold, config)
    sources, ranges = cases.sources, train.column("ranges")
    fill, width = [], []
    for channel in range(sources[0].in_channels):
        low, high = sources[0].intensities.normalized_window(channel) or (
            float(ranges[:, 0, channel].min()),
            float(ranges[:, 1, channel].max()),
        )
        fill.append(low)
        width.append(high - low)
    flat = tuple(FLAT_FRACTION * w for w in width)
    return RunData(list(sources), train, val, fold, tuple(fill), flat, tuple(width))
