"""From settings to a running pretraining: find the data, check everything, then train."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy

from nnunet_mim.config import PretrainConfig, Size3, network_from_dict
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of, suitable_scale, views_per_crop
from nnunet_mim.pretraining.case_index import CaseInfo, read_index
from nnunet_mim.pretraining.checkpoint import FINAL, LATEST, case_records, load_checkpoint
from nnunet_mim.pretraining.configure import build_config, network_of
from nnunet_mim.pretraining.data import RunData
from nnunet_mim.pretraining.dataset import Case
from nnunet_mim.pretraining.sources import Source, fold_validation_cases

DEFAULT_VIEW_TOKENS = 6


def output_folder(source: Source, fold: int | str, tag: str | None) -> Path:
    """`nnUNet_results/DatasetXXX_Name/MiMPretrain[_TAG]__PLANS__CONFIGURATION/fold_X`, X = `all` without a fold."""
    name = "MiMPretrain" if tag is None else f"MiMPretrain_{tag}"
    run = f"{name}__{source.plans_name}__{source.configuration}"
    return Path(str(nnUNet_results)) / source.dataset / run / f"fold_{fold}"


def check_output_folder(folder: Path, resume: bool) -> bool:
    """Decide whether a run may write into its folder.

    Returns:
        True to train, False if the run of this folder is finished and `resume` asks for nothing more.

    Raises:
        MiMError: a new run would overwrite another, or there is nothing to continue.
    """
    final, latest = (folder / FINAL).is_file(), (folder / LATEST).is_file()
    if resume and final:
        return False
    if resume and not latest:
        raise MiMError(f"--c: nothing to continue, no {LATEST} in {folder}: leave out --c to start anew")
    if not resume and (final or latest):
        state = "finished" if final else "unfinished"
        raise MiMError(
            f"{folder} holds another, {state} run: continue it with --c, keep it and choose a tag with -o, or delete it"
        )
    return True


def resumable_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint that `--c` continues from. Raises MiMError where it is damaged or cannot be continued."""
    stored = load_checkpoint(folder / LATEST)
    if "resume_state" not in stored:
        raise MiMError(f"{folder / LATEST} holds no resume state: it cannot be continued")
    return stored


def check_same_run(stored: dict[str, Any], config: PretrainConfig, train: Sequence[Case]) -> None:
    """Raise MiMError unless an interrupted run was started with these settings and cases.

    Args:
        stored: its checkpoint.
        config: settings now.
        train: cases to train on now.
    """
    before, now = PretrainConfig.from_dict(stored["mim_config"]).to_dict(), config.to_dict()
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in now if before.get(name) != now.get(name)]
    if changed:
        raise MiMError(f"--c: the run was started with other settings ({'; '.join(changed)}): use the same")
    records = {tuple(sorted(record.items())) for record in case_records(list(train))}
    known = {tuple(sorted(record.items())) for record in stored["provenance"]["cases"]}
    gone = set() if config.init_checkpoint else known - records  # --init brings records of an earlier run's cases
    if changed_cases := sorted({dict(record)["case"] for record in (records - known) | gone}):
        raise MiMError(
            f"--c: the run was started on other cases than those of -d now ({len(changed_cases)} came, went or "
            f"changed, {changed_cases[0]} first): give the same datasets, or start a new run with -o TAG and --init"
        )


def check_settings(given: Mapping[str, Any], n_devices: int) -> None:
    """Raise MiMError where settings cannot work on any data."""
    config = build_config(given, 1, smallest_view(given), (2, 2, 2))
    levels_of(config)
    if config.batch_size % n_devices:
        raise MiMError(f"--batch {config.batch_size} is the batch of all {n_devices} devices: make it a multiple of it")


def smallest_view(given: Mapping[str, Any]) -> Size3:
    """Two tokens an axis."""
    return tuple(2 * p for p in network_of(given).token_size)  # type: ignore[return-value]


def describe(config: PretrainConfig, data: RunData) -> str:
    """What a run will do, for the eyes of its user."""
    spacing = " x ".join(f"{s:.2f}" for s in data.sources[0].spacing)
    lines = [f"{len(data.train)} training and {len(data.val)} held-out cases, spacing {spacing} mm"]
    levels = levels_of(config)
    for level, count in zip(levels, views_per_crop(levels), strict=True):
        visible = f"{level.n_visible_tokens} of {level.n_tokens} tokens visible"
        lines.append(f"  {count} views a crop of {level.fov} voxels, seen as {level.view_size}: {visible}")
    lines.append(f"preset {config.preset}, {config.iterations} iterations of {config.batch_size} crops")
    return "\n".join(lines)


def check_init(settings: Mapping[str, Any], in_channels: int) -> None:
    """Raise MiMError unless a run with these settings can start from the weights of its `init_checkpoint`."""
    path = settings["init_checkpoint"]
    stored = load_checkpoint(Path(path))["mim_config"]
    config = build_config(settings, in_channels, smallest_view(settings), (2, 2, 2))
    found = network_from_dict(stored["network"]), stored["in_channels"], stored["alignment"]
    if found != (config.network, in_channels, config.alignment):
        raise MiMError(
            f"--init {path} holds a network of preset {stored['preset']} for {stored['in_channels']} channels with "
            f"alignment {stored['alignment']}, not that of this run: choose its --preset and --alignment, and data "
            "with as many channels"
        )


def default_view(infos: Sequence[CaseInfo], token_size: Size3) -> Size3:
    """Six tokens per axis (96 voxels), fewer where the median case has no room for the view: an even number, at
    least two.
    """
    median = np.median([info.shape for info in infos], axis=0)
    tokens = [min(DEFAULT_VIEW_TOKENS, max(2, 2 * int(m // (2 * p)))) for m, p in zip(median, token_size, strict=True)]
    return tuple(t * p for t, p in zip(tokens, token_size, strict=True))  # type: ignore[return-value]


def default_scale(infos: Sequence[CaseInfo], ladder: str, view_size: Size3) -> Size3:
    """Scale per axis that the median case has room for."""
    return suitable_scale(ladder, view_size, tuple(np.median([info.shape for info in infos], axis=0)))


def index_sources(sources: Sequence[Source]) -> list[list[CaseInfo]]:
    """Check and describe every case of every dataset; `.npz` cases are unpacked first so that crops can be read."""
    indexes = []
    for source in sources:
        if issubclass(source.dataset_class, nnUNetDatasetNumpy):
            for case in source.cases:
                check_npz(source, case)
            source.dataset_class.unpack_dataset(str(source.folder), False, max(1, (os.cpu_count() or 1) // 2), True)
        indexes.append(read_index(source))
    return indexes


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


def split_cases(
    sources: Sequence[Source], indexes: Sequence[list[CaseInfo]], fold: int | str, config: PretrainConfig
) -> tuple[list[Case], list[Case]]:
    """Training cases, and the held-out ones that the loss is measured on.

    With a fold, its validation cases of nnU-Net's own split are held out of every labelled dataset. Without one,
    `config.val_cases` cases (at most a tenth) are held out at random; content never appears on both sides.

    Raises:
        MiMError: too few cases.
    """
    cases = [Case(source, info) for source, index in zip(sources, indexes, strict=True) for info in index]
    if fold == "all":
        order = np.random.default_rng(config.seed).permutation(len(cases))
        count = max(1, min(config.val_cases, len(cases) // 10))
        held_out = {(cases[i].source.dataset, cases[i].info.case) for i in order[:count]}
    else:
        held_out = {(s.dataset, case) for s in sources for case in fold_validation_cases(s, int(fold))}
        if not held_out:
            raise MiMError(f"-f {fold}: none of the datasets has labels, so there is no split; leave out -f")
    val = [case for case in cases if (case.source.dataset, case.info.case) in held_out]
    seen = {case.info.sha256 for case in val}
    train = [
        case for case in cases
        if (case.source.dataset, case.info.case) not in held_out and case.info.sha256 not in seen
    ]  # fmt: skip
    if not train or not val:
        raise MiMError(f"{len(cases)} cases are too few: pretraining needs at least one to train on and one held out")
    return train, val


def run_data(
    sources: list[Source], indexes: Sequence[list[CaseInfo]], fold: int | str, config: PretrainConfig
) -> RunData:
    """Cases, and the intensities that padding and the flat-token rule need."""
    train, val = split_cases(sources, indexes, fold, config)
    fill, width = [], []
    for channel in range(sources[0].in_channels):
        window = sources[0].window(channel)
        if window is None:
            infos = [case.info for case in train]
            window = min(i.low[channel] for i in infos), max(i.high[channel] for i in infos)
        fill.append(window[0])
        width.append(window[1] - window[0])
    return RunData(sources, train, val, fold, tuple(fill), tuple(config.flat_fraction * w for w in width), tuple(width))
