"""From what a user has typed to a Run: find the data, and check everything before any long work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_results

from nnunet_mim.checkpoint.format import is_state_dict, load_checkpoint, settings_of
from nnunet_mim.checkpoint.identity import case_key
from nnunet_mim.checkpoint.locate import FINAL, LATEST, lasting_name
from nnunet_mim.config import PretrainConfig, network_from_dict
from nnunet_mim.errors import MiMError, printable
from nnunet_mim.geometry import level_number, levels_of, views_per_crop
from nnunet_mim.nnunet.datasets import dataset_names, require_environment
from nnunet_mim.nnunet.source import (
    Source,
    find_source,
    orientation_warning,
    prepare_command,
    require_same_units,
    window_warning,
)
from nnunet_mim.nnunet.splits import fold_validation_cases, left_out_of_fold
from nnunet_mim.pretraining.configure import config_for_data, merge_settings, with_network_of_plans
from nnunet_mim.pretraining.data.crops import Cases, dataset_shares
from nnunet_mim.pretraining.data.run_data import RunData, index_sources, run_data
from nnunet_mim.pretraining.distributed.launch import say
from nnunet_mim.pretraining.options import DataOptions, RunOptions


@dataclass(frozen=True)
class Run:
    """Everything that a pretraining needs."""

    config: PretrainConfig
    """what is computed"""
    data: RunData
    """cases to train on and to measure on"""
    folder: Path
    """output folder"""
    options: RunOptions
    """how this machine computes it"""
    strict: bool = False
    """end the run at a case that cannot be read any more, instead of drawing another one"""
    stored: Mapping[str, Any] | None = None
    """checkpoint that the run continues from; None for a new run"""

    def summary(self) -> str:
        """What the run will do, in lines for its user."""
        config, data = self.config, self.data
        spacing = " x ".join(f"{s:.2f}" for s in data.sources[0].spacing)
        cases = f"{len(data.train)} training and {len(data.val)} held-out cases"
        lines = [f"{cases}, spacing {spacing} mm (axes here and below as in the plans)"]
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
        if config.decoder == "unet":
            views = " + ".join(f"{config.unet_views[n - 1]} of level {n}" for n in config.unet_levels(len(levels)))
            lines.append(
                f"  the U-Net learns every {config.unet_every} iterations from iteration {config.unet_begins + 1} on, "
                f"from views of each crop: {views}"
            )
        return "\n".join(lines)


def find_sources(where: DataOptions) -> list[Source]:
    """The preprocessed datasets of a run.

    Raises:
        MiMError: nnU-Net's variables are not set, a dataset is not there or is there twice, or two differ in units.
    """
    require_environment()
    sources = [find_source(dataset, where.plans, where.configuration) for dataset in dataset_names(where.datasets)]
    require_same_units(sources)
    return sources


def output_folder(source: Source, where: DataOptions) -> Path:
    """`nnUNet_results/DatasetXXX_Name/MiMPretrain[_TAG]__PLANS__CONFIGURATION/fold_X`, X = `all` without a fold."""
    name = f"MiMPretrain_{where.tag}" if where.tag else "MiMPretrain"
    run = f"{name}__{source.plans_name}__{source.configuration}"
    return Path(str(nnUNet_results)) / source.dataset / run / f"fold_{where.fold}"


def is_finished(folder: Path, resume: bool) -> bool:
    """Whether the run of this folder is finished and `--c` has nothing more to do.

    Raises:
        MiMError: a new run would overwrite another, or there is nothing to continue.
    """
    final, latest = (folder / FINAL).is_file(), (folder / LATEST).is_file()
    if resume and not (final or latest):
        raise MiMError(f"--c: nothing to continue, no {LATEST} in {folder}: leave out --c to start anew")
    if not resume and (final or latest):
        state = "finished" if final else "unfinished"
        raise MiMError(
            f"{folder} holds another, {state} run: continue it with --c, keep it and choose a tag with -o, or delete it"
        )
    return final


def set_up(
    given: Mapping[str, Any], sources: list[Source], folder: Path, where: DataOptions, options: RunOptions,
    n_devices: int = 1,
) -> Run:  # fmt: skip
    """Check settings, checkpoint and cases, and decide what the data decides. Warnings are printed.

    Args:
        given: settings of file, flags and `--set`, see `merge_settings`.
        sources: datasets, see `find_sources`.
        folder: output folder.
        where: as typed.
        options: resolved for this machine.
        n_devices: devices that share the batch.

    Raises:
        MiMError: something cannot work.
    """
    first = sources[0]
    if given.get("init_checkpoint"):
        given = _with_decoder_of_init(given)
    given = with_network_of_plans(given, sources, where.resume)
    _check_settings(given, first, n_devices)
    if where.fold_number is not None:
        for source in sources:
            fold_validation_cases(source, where.fold_number)  # says now what is wrong with the fold
            if names := left_out_of_fold(source, where.fold_number):
                say(f"warning: {source.dataset}: mim_prepare has left out validation cases: {', '.join(names)}")
    stored = _resumable_checkpoint(folder) if where.resume else None
    settings = merge_settings(stored["mim_config"], given) if stored is not None else given
    if settings.get("encoder") == "resenc" and options.recompute:
        raise MiMError("--recompute is for --encoder hybrid: leave it out")
    if settings.get("init_checkpoint") and stored is None:
        _check_init(settings, first)
    for warning in [*map(window_warning, sources), orientation_warning(sources)]:
        if warning:
            say(f"warning: {warning}")

    cases, bad = index_sources(sources, where.strict, where.trust_index)
    for line in bad:
        say(f"warning: left out: {line}")
    if bad:
        say(f"warning: {len(bad)} cases are left out, {len(cases)} are used (--strict makes this an error)")
    config = config_for_data(settings, first, cases.column("shapes"))
    data = run_data(cases, "all" if where.fold_number is None else where.fold_number, config)
    _check_tokens(config, data.train)
    if line := data.copies_warning():
        say(f"warning: {line}")
    n_levels = len(levels_of(config))
    if config.decoder == "unet" and not config.unet_levels(n_levels):
        raise MiMError(
            f"unet_views {config.unet_views}: these cases are only wide enough for levels {level_number(0, n_levels)} "
            "to 3: add --set unet_views=0,0,1"
        )
    if stored is not None:
        _check_same_run(stored, config, data.train)
    return Run(config, data, folder, options, where.strict, stored)


def _with_decoder_of_init(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the decoder's sizes of their `init_checkpoint` where they have none; plans do not name them."""
    path = lasting_name(given["init_checkpoint"])
    network = load_checkpoint(path)["mim_config"]["network"]
    decoder = {name: value for name, value in network.items() if name.startswith("decoder_")}
    return {**given, "init_checkpoint": path, "network": {**decoder, **given.get("network", {})}}


def _check_settings(given: Mapping[str, Any], source: Source, n_devices: int) -> None:
    """Raise MiMError where settings cannot work on data with the spacing of this one."""
    config = config_for_data(given, source)
    levels_of(config)
    if config.batch_size % n_devices:
        raise MiMError(f"--batch {config.batch_size} is the batch of all {n_devices} devices: make it a multiple of it")


def _check_tokens(config: PretrainConfig, train: Cases) -> None:
    """Raise MiMError where a level has no whole token in any training case, and so nothing to learn."""
    shapes = train.column("shapes")
    if (found := _level_without_token(config, shapes)) is None:
        return
    number, extent = found
    shares = (shapes / extent).min(axis=1)
    size, token = (" x ".join(str(int(n)) for n in of) for of in (shapes[shares.argmax()], extent))
    if config.scale != (1, 1, 1) and _level_without_token(replace(config, scale=(1, 1, 1)), shapes) is None:
        remedy = "add --scale 1 1 1"
    else:
        finer = prepare_command(train.sources, 0.95 * float(shares.max()))
        remedy = f"prepare finer voxels ({finer}), or larger cases"
    raise MiMError(
        f"level {number} has nothing to learn: its tokens are made of {token} voxels (axes as in the plans), and the "
        f"largest case has {size}: {remedy}"
    )


def _level_without_token(config: PretrainConfig, shapes: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Number of the first trained level that no case of these shapes (N, 3) holds a whole token of, and the voxels per
    axis of such a token; None where there is none.
    """
    levels = levels_of(config)
    for position, level in enumerate(levels):
        number, extent = level_number(position, len(levels)), np.array(level.token_extent)
        if config.level_weights[number - 1] > 0 and not (shapes >= extent).all(axis=1).any():
            return number, extent
    return None


def _resumable_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint that `--c` continues from. Raises MiMError where it is damaged or cannot be continued."""
    stored = load_checkpoint(folder / LATEST)
    state = stored.get("resume_state")
    optimizer = state.get("optimizer") if isinstance(state, dict) else None
    if not isinstance(optimizer, dict) or not all(map(is_state_dict, optimizer.values())):
        raise MiMError(f"{folder / LATEST} holds no resume state: start anew with -o TAG and --init {folder / LATEST}")
    for name, moments in optimizer.items():
        weight = stored["network_weights"].get(name)
        if weight is None or any(moment.shape not in (weight.shape, ()) for moment in moments.values()):
            raise MiMError(
                f"{folder / LATEST}: the resume state of {printable(name)} is of another network: start anew with -o "
                f"TAG and --init {folder / LATEST}"
            )
    settings_of(stored, folder / LATEST)
    return stored


def _check_same_run(stored: Mapping[str, Any], config: PretrainConfig, train: Cases) -> None:
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
    cases_before = {case_key(record) for record in stored["provenance"]["cases"]}
    cases_now = {case_key(record) for record in train.records()}
    gone = set() if config.init_checkpoint else cases_before - cases_now  # --init brings cases of an earlier run
    if changed_cases := sorted({case for _, case, _ in (cases_now - cases_before) | gone}):
        raise MiMError(
            f"--c: the run was started on other cases than those of -d now ({len(changed_cases)} came, went or "
            f"changed, {changed_cases[0]} first): give the same datasets, or start a new run with -o TAG and --init"
        )


def _check_init(settings: Mapping[str, Any], source: Source) -> None:
    """Raise MiMError unless a run with these settings can start from the weights of its `init_checkpoint`."""
    path = settings["init_checkpoint"]
    stored = load_checkpoint(path)["mim_config"]
    config = config_for_data(settings, source)
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
