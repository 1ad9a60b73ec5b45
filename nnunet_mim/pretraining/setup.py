"""From settings to a running pretraining: find the data, check everything, then train."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.checkpoint.format import FINAL, LATEST, load_checkpoint
from nnunet_mim.checkpoint.identity import case_key
from nnunet_mim.config import PretrainConfig, Size3, network_from_dict
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of, suitable_scale, suitable_strides, suitable_view, views_per_crop
from nnunet_mim.networks.resenc import check_resenc, check_view, fitting_view
from nnunet_mim.nnunet.source import Source
from nnunet_mim.nnunet.splits import fold_validation_cases
from nnunet_mim.pretraining.configure import build_config, network_of, triple
from nnunet_mim.pretraining.data.case_index import read_index, remedy
from nnunet_mim.pretraining.data.crops import Cases, case_records, dataset_shares
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.machine import usable_cores


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


def check_same_run(stored: dict[str, Any], config: PretrainConfig, train: Cases) -> None:
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
    records, known = (
        {case_key(record) for record in of} for of in (case_records(train), stored["provenance"]["cases"])
    )
    gone = set() if config.init_checkpoint else known - records  # --init brings records of an earlier run's cases
    if changed_cases := sorted({case for _, case, _ in (records - known) | gone}):
        raise MiMError(
            f"--c: the run was started on other cases than those of -d now ({len(changed_cases)} came, went or "
            f"changed, {changed_cases[0]} first): give the same datasets, or start a new run with -o TAG and --init"
        )


def check_settings(given: Mapping[str, Any], source: Source, n_devices: int) -> None:
    """Raise MiMError where settings cannot work on data with the spacing of this one."""
    strides = suitable_strides(source.spacing)
    config = build_config(given, 1, smallest_view(given, strides), (2, 2, 2), strides)
    levels_of(config)
    if config.batch_size % n_devices:
        raise MiMError(f"--batch {config.batch_size} is the batch of all {n_devices} devices: make it a multiple of it")


def with_architecture(settings: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Settings, and with `encoder: resenc` the network of the plans.

    Raises:
        MiMError: the plans name another network, or the view is not what it can halve.
    """
    if settings.get("encoder") != "resenc":
        return dict(settings)
    config = PlansManager(dict(source.plans)).get_configuration(source.configuration).configuration
    architecture = settings.get("architecture") or config["architecture"]
    check_resenc(architecture)
    if "view_size" in settings:
        check_view(architecture, triple(settings["view_size"], "--view"))
    return {**settings, "architecture": architecture}


def smallest_view(given: Mapping[str, Any], strides: tuple[Size3, ...] | None = None) -> Size3:
    """Two tokens an axis."""
    return tuple(2 * p for p in network_of(given, strides).token_size)  # type: ignore[return-value]


def config_for_data(settings: Mapping[str, Any], source: Source, shapes: np.ndarray) -> PretrainConfig:
    """Settings of a run; views, fields of view and tokens that are not set suit the data.

    Args:
        settings: of `merge_settings`.
        source: one of the datasets; all have its spacing and channels.
        shapes: (N, 3) voxels of the cases.

    Raises:
        MiMError: they cannot work.
    """
    strides = suitable_strides(source.spacing)
    median = tuple(np.median(shapes, axis=0))
    small = build_config(settings, source.in_channels, smallest_view(settings, strides), (2, 2, 2), strides)
    view = small.view_size if "view_size" in settings else suitable_view(median, small.network.token_size)
    if small.encoder == "resenc" and "view_size" not in settings:
        view = fitting_view(small.architecture, view, small.network.token_size)
    scale = small.scale if "scale" in settings else suitable_scale(small.ladder, view, median, small.network.token_size)
    return build_config(settings, source.in_channels, view, scale, strides)


def describe(config: PretrainConfig, data: RunData) -> str:
    """What a run will do, for the eyes of its user."""
    spacing = " x ".join(f"{s:.2f}" for s in data.sources[0].spacing)
    lines = [f"{len(data.train)} training and {len(data.val)} held-out cases, spacing {spacing} mm"]
    if len(data.sources) > 1:
        shares = dataset_shares(data.train.counts, config.dataset_temperature)
        for source, trained, held_out, share in zip(
            data.sources, data.train.counts, data.val.counts, shares, strict=True
        ):
            lines.append(f"  {source.dataset}: {trained} and {held_out} cases, {share:.0%} of the crops")
    levels = levels_of(config)
    for level, count in zip(levels, views_per_crop(levels), strict=True):
        visible = f"{level.n_visible_tokens} of {level.n_tokens} tokens visible"
        lines.append(f"  {count} views a crop of {level.fov} voxels, seen as {level.view_size}: {visible}")
    network = f"preset {config.preset}" if config.encoder == "hybrid" else f"encoder {config.encoder}"
    lines.append(f"{network}, {config.iterations} iterations of {config.batch_size} crops")
    return "\n".join(lines)


def check_init(settings: Mapping[str, Any], source: Source) -> None:
    """Raise MiMError unless a run with these settings can start from the weights of its `init_checkpoint`."""
    path = settings["init_checkpoint"]
    stored = load_checkpoint(Path(path))["mim_config"]
    strides = suitable_strides(source.spacing)
    config = build_config(settings, source.in_channels, smallest_view(settings, strides), (2, 2, 2), strides)
    found = network_from_dict(stored["network"]), stored["in_channels"], stored["alignment"]
    encoder = stored.get("encoder", "hybrid"), stored.get("architecture", {})
    same_encoder = encoder == (config.encoder, config.architecture)
    if not same_encoder or found != (config.network, config.in_channels, config.alignment):
        raise MiMError(
            f"--init {path} holds a network of preset {stored['preset']} for {stored['in_channels']} channels with "
            f"encoder {encoder[0]}, alignment {stored['alignment']} and strides {stored['network']['strides']}, not "
            "that of this run: choose its --preset, --encoder, --alignment and --set network.strides=…, and data with "
            "as many channels"
        )


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
        low, high = sources[0].window(channel) or (
            float(ranges[:, 0, channel].min()),
            float(ranges[:, 1, channel].max()),
        )
        fill.append(low)
        width.append(high - low)
    flat = tuple(config.flat_fraction * w for w in width)
    return RunData(list(sources), train, val, fold, tuple(fill), flat, tuple(width))
