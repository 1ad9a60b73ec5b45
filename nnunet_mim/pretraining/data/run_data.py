"""The cases of a run: checked, described, and split into those to train on and those held out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy

from nnunet_mim.checkpoint.fingerprint import most_similar
from nnunet_mim.config import FLAT_FRACTION, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import Source
from nnunet_mim.nnunet.splits import fold_validation_cases
from nnunet_mim.pretraining.data.case_index import read_index, remedy
from nnunet_mim.pretraining.data.crops import Cases
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.machine import usable_cores

MAX_COMPARED = 20_000
"""cases that are compared with each other when a run starts: 10,000 take some 40 s, twice as many four times that"""


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

    def copies_warning(self) -> str:
        """Which cases look like copies of others, and how many cannot be compared, in one line; empty without any."""
        n_cases = len(self.val) + len(self.train)
        if n_cases > MAX_COMPARED:
            return f"{n_cases} cases are too many to look for copies among them (at most {MAX_COMPARED})"
        names = [f"{case.source.dataset} {case.info.case}" for part in (self.val, self.train) for case in part]
        fingerprints = np.concatenate([part.column("fingerprints") for part in (self.val, self.train)])
        originals = most_similar(fingerprints, fingerprints, only_earlier=True)
        pairs = [f"{names[copy]} and {names[originals[copy]]}" for copy in np.flatnonzero(originals >= 0)]
        split = int(((originals >= 0) & (originals < len(self.val)))[len(self.val) :].sum())
        without = int((~fingerprints.any(axis=(1, 2))).sum())
        parts = []
        if pairs:
            more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
            held_out = f"; of {split} pairs one is held out and the other trained on" if split else ""
            parts.append(f"probably the same, and used all the same: {', '.join(pairs[:3])}{more}{held_out}")
        if without:
            parts.append(f"{without} cases have no fingerprint (too small, or no CT window around soft tissue)")
        return "; ".join(parts)


def index_sources(
    sources: Sequence[Source], strict: bool = False, trust_index: bool = False
) -> tuple[Cases, list[str]]:
    """Check and describe every case of every dataset; `.npz` cases are unpacked first so that crops can be read.

    Args:
        sources: datasets.
        strict: a case that cannot be used is an error.
        trust_index: as in `read_index`.

    Returns:
        the cases that can be used, and one line for each that cannot.

    Raises:
        MiMError: `strict`, and there is one that cannot be used; or there is none that can.
    """
    indexes, bad = [], []
    for source in sources:
        damaged = _unpack(source) if issubclass(source.dataset_class, nnUNetDatasetNumpy) else {}
        index, problems = read_index(source, remember_vanished=strict, trusted=trust_index)
        indexes.append(index)
        bad += [f"{source.dataset} {case}: {damaged.get(case, problem)}" for case, problem in problems.items()]
    if bad and strict:
        more = f" ({len(bad) - 1} more cases cannot be used: {', '.join(b.split(':')[0] for b in bad[1:])})"
        raise MiMError(f"{bad[0]}{more if bad[1:] else ''}")
    cases = Cases(sources, indexes)
    if not len(cases):
        raise MiMError(f"no case can be used: {bad[0]}")
    return cases, bad


def _unpack(source: Source) -> dict[str, str]:
    """Unpack `.npz` cases that are not yet. Returns what is wrong with damaged ones, which are left as they are."""
    damaged = {case: problem for case in source.cases if (problem := _damage(source, case))}
    if not damaged:
        source.dataset_class.unpack_dataset(str(source.folder), False, max(1, usable_cores() // 2), True)
        return {}
    for case in source.cases:
        if case not in damaged and not (source.folder / f"{case}.npy").is_file():
            with np.load(source.folder / f"{case}.npz", allow_pickle=False) as archive:
                for name, part in ((f"{case}_seg.npy", "seg"), (f"{case}.npy", "data")):
                    content = io.BytesIO()
                    np.save(content, archive[part])
                    write_atomically(source.folder / name, content.getvalue())
    return damaged


def _damage(source: Source, case: str) -> str:
    """What is wrong with an `.npz` that nnU-Net would fail to unpack without naming it; empty for a sound one."""
    path = source.folder / f"{case}.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            _ = archive["data"], archive["seg"]
    except Exception as error:
        return f"cannot read {path} ({type(error).__name__}: {error}): {remedy(source, case)}"
    return ""


def _split_cases(cases: Cases, fold: int | str, config: PretrainConfig) -> tuple[Cases, Cases]:
    """Training cases and held-out ones; content never appears on both sides.

    With a fold, its validation cases of nnU-Net's own split are held out of every labelled dataset. Of a dataset
    without labels, and of all where there is no fold, `config.val_cases` cases (at most a tenth, at least one) are held
    out at random.

    Raises:
        MiMError: too few cases, or a fold and no labels anywhere.
    """
    held_out, any_split, names = [], False, cases.column("names")
    for number, source in enumerate(cases.sources):
        rows = np.flatnonzero(cases.numbers[:, 0] == number)
        chosen = fold_validation_cases(source, int(fold)) if fold != "all" else ()
        if chosen:
            any_split = True
            held_out.append(rows[np.isin(names[rows], chosen)])
        else:
            count = max(1, min(config.val_cases, len(rows) // 10)) if len(rows) > 1 else 0
            held_out.append(np.random.default_rng(config.seed).permutation(rows)[:count])
    if fold != "all" and not any_split:
        raise MiMError(f"-f {fold}: none of the datasets has labels, so there is no split; leave out -f")
    val_numbers = np.concatenate(held_out)
    hashes = [row.tobytes() for row in cases.column("hashes")]
    held_out_hashes = {hashes[number] for number in val_numbers}
    is_training = [hash_ not in held_out_hashes for hash_ in hashes]
    train, val = cases.take(np.flatnonzero(is_training)), cases.take(val_numbers)
    if not len(train) or not len(val):
        raise MiMError(f"{len(cases)} cases are too few: pretraining needs at least one to train on and one held out")
    return train, val


def run_data(cases: Cases, fold: int | str, config: PretrainConfig) -> RunData:
    """Cases, and the intensities that padding and the flat-token rule need."""
    train, val = _split_cases(cases, fold, config)
    source, ranges = cases.sources[0], train.column("ranges")
    lowest, highest = ranges[:, 0].min(axis=0).tolist(), ranges[:, 1].max(axis=0).tolist()
    windows = [
        source.intensities.normalized_window(channel) or (lowest[channel], highest[channel])
        for channel in range(source.in_channels)
    ]
    width = tuple(high - low for low, high in windows)
    fill, flat = tuple(low for low, _ in windows), tuple(FLAT_FRACTION * w for w in width)
    return RunData(list(cases.sources), train, val, fold, fill, flat, width)
