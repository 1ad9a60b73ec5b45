"""Fill in what plans leave open before a training: the architecture and the recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.checkpoint.locate import FINAL, find_checkpoint, no_checkpoint_error
from nnunet_mim.config import PRESETS, NetworkConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import cumulative_strides, suitable_strides
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.nnunet.datasets import required_folder
from nnunet_mim.nnunet.documents import check_plans
from nnunet_mim.nnunet.orientation import MIRRORING_IS_OFF, REORIENTING, mirroring_is_unsafe
from nnunet_mim.nnunet.plans import (
    configuration_of,
    n_channels,
    require_preprocessed,
    same_architecture,
    saved_architecture,
    saved_plans,
    spacings_alike,
    uses_hybrid_unet,
)
from nnunet_mim.trainers.finetune_config import PLANS_KEY, FinetuneConfig
from nnunet_mim.trainers.transfer import check_architecture

DEFAULT_PRESET = "base"


@dataclass
class ResolvedPlans:
    """What a trainer starts from."""

    plans: dict[str, Any]
    """a copy with HybridUNet as the configuration's architecture, and a complete `mim_finetune`"""
    finetune: FinetuneConfig
    checkpoint: PretrainedCheckpoint | None
    """read and checked already, if this is a fresh training"""
    notes: list[str]
    """lines for the training log"""


def resolve_plans(
    plans: dict[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: dict[str, Any],
    trainer: str,
    pretrained: bool,
) -> ResolvedPlans:
    """Check all input before nnU-Net does anything, and fill in what the plans leave open.

    Plans of `mim_plan` name HybridUNet and mirroring axes. With other plans the architecture is, first hit: that of
    folds trained in the same output folder; (control) that of nnUNetTrainerMiM's output folder; that of the pretraining
    checkpoint; (control) the default preset. Mirroring axes come from the same folders. A new training has none where
    the raw images are not stored in axial slices.

    Args:
        plans: content of the plans file, with `continue_training` as nnU-Net adds it; not changed.
        fold: number or "all".
        trainer: class name, part of the output folder's name.
        pretrained: whether this trainer starts from a pretraining checkpoint; False: the control.

    Raises:
        MiMError: any bad input.
    """
    plans = check_plans(deepcopy(plans), f"the plans of {plans.get('dataset_name')}")
    finetune = FinetuneConfig.from_plans(plans)
    config = configuration_of(plans, configuration)
    dataset = Path(required_folder("nnUNet_preprocessed"), plans["dataset_name"])
    require_preprocessed(dataset / config["data_identifier"], plans, plans["plans_name"], configuration)
    results = required_folder("nnUNet_results")
    trainers = dict.fromkeys([trainer] if pretrained else [trainer, "nnUNetTrainerMiM"])
    folders = [Path(results, plans["dataset_name"], f"{t}__{plans['plans_name']}__{configuration}") for t in trainers]
    fold_folder = folders[0] / f"fold_{fold}"
    if plans.get("continue_training") and not any(fold_folder.glob("checkpoint_*.pth")):
        raise MiMError(f"--c: nothing to continue in {fold_folder}: start the training without --c")
    architecture, notes = _settled_architecture(plans, configuration, config, folders)

    checkpoint = None
    surely_fresh = not plans.get("continue_training") and not (fold_folder / FINAL).is_file()
    if surely_fresh and (pretrained or architecture is None):
        path = find_checkpoint(plans, configuration, fold, results)
        if path is not None:
            checkpoint = PretrainedCheckpoint.load(path)
        elif pretrained:
            raise no_checkpoint_error(plans, configuration, fold, results)
    if architecture is None:
        architecture, notes = _new_architecture(plans, config, checkpoint)
    if notes:
        notes.extend(_deep_supervision_note(architecture, config["patch_size"]))
    if finetune.mirror_axes is None:
        axes, mirroring_notes = _mirror_axes(plans, dataset_json, folders)
        finetune = replace(finetune, mirror_axes=axes)
        notes.extend(mirroring_notes)

    architecture["_kw_requires_import"] = []  # nnU-Net would import what plans name here
    architecture["arch_kwargs"]["drop_path"] = finetune.drop_path
    if checkpoint is not None and pretrained:
        check_architecture(checkpoint, architecture["arch_kwargs"], n_channels(dataset_json))
    plans["configurations"][configuration]["architecture"] = architecture
    plans[PLANS_KEY] = finetune.to_dict()
    return ResolvedPlans(plans, finetune, checkpoint if pretrained else None, notes)


def network_for(checkpoint: PretrainedCheckpoint, spacing: tuple[float, ...]) -> tuple[NetworkConfig, list[str]]:
    """Sizes of the pretrained network at a spacing (mm, array order), and notes.

    Where pretraining had voxels of another shape the strides suit the new spacing: tokens would be long and thin.
    """
    network, pretrained = checkpoint.network, checkpoint.provenance.get("spacing")
    if not pretrained or spacings_alike(pretrained, spacing):
        return network, []
    strides = suitable_strides(spacing)
    if strides == network.strides:
        return network, []
    now, before = ([list(stride) for stride in of] for of in (strides, network.strides))
    note = f"strides {now} suit this spacing (pretraining: {before}); kernels between stages are resized to them"
    return replace(network, strides=strides), [note]


def _settled_architecture(
    plans: dict[str, Any], configuration: str, config: dict[str, Any], folders: Sequence[Path]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Architecture of the plans, or of earlier trainings in these output folders, and notes; None where all are silent.

    Raises MiMError where the plans and the trainings in the first folder disagree.
    """
    planned = config["architecture"] if uses_hybrid_unet(config) else None
    saved = saved_architecture(folders[0], configuration)
    if planned and saved and not same_architecture(planned, saved):
        raise MiMError(
            f"{folders[0]} holds folds of another architecture than the plans {plans['plans_name']} have now: "
            f"move that folder away, or write plans under another name, "
            f"mim_plan -d {plans['dataset_name'][7:10]} -o NAME"
        )
    if planned or saved:
        return planned or saved, []
    for folder in folders[1:]:
        architecture = saved_architecture(folder, configuration)
        if architecture is not None:
            network = f"that of {folder.name}, whose control this is"
            return architecture, [f"Plans {plans['plans_name']} name another network, replaced by {network}"]
    return None, []


def _new_architecture(
    plans: dict[str, Any], config: dict[str, Any], checkpoint: PretrainedCheckpoint | None
) -> tuple[dict[str, Any], list[str]]:
    """Architecture of the checkpoint, or of the default preset, for plans that name another network; and notes."""
    spacing = tuple(config["spacing"])
    if checkpoint is not None:
        network, notes = network_for(checkpoint, spacing)
        origin = f"the checkpoint ({checkpoint.preset})"
    else:
        network = replace(PRESETS[DEFAULT_PRESET], strides=suitable_strides(spacing))
        notes = ["The control needs the network of its twin: set nnUNet_mim_checkpoint, or use plans of mim_plan"]
        origin = f"the default preset {DEFAULT_PRESET}"
    note = (
        f"Plans {plans['plans_name']} name another network, replaced by HybridUNet of {origin}: embed_dims "
        f"{network.embed_dims}, depths {network.depths}, heads {network.num_heads}, token {network.token_size} "
        "(the plans' order of axes)"
    )
    widths = checkpoint.unet_widths if checkpoint is not None else None
    return plans_architecture(network, config["patch_size"], widths), [note, *notes]


def _mirror_axes(
    plans: dict[str, Any], dataset_json: dict[str, Any], folders: Sequence[Path]
) -> tuple[tuple[int, ...] | None, list[str]]:
    """Mirroring axes for plans that name none, and notes.

    Earlier trainings in these output folders decide: the raw images may have changed or gone since.
    """
    for folder in folders:
        saved = saved_plans(folder)
        if saved is not None:
            axes = saved.get(PLANS_KEY, {}).get("mirror_axes")
            return (None if axes is None else tuple(axes)), []
    raw = Path(os.environ.get("nnUNet_raw", ""), plans["dataset_name"])
    if plans.get("image_reader_writer") in REORIENTING.values() or not mirroring_is_unsafe(raw, dataset_json):
        return None, []
    return (), [MIRRORING_IS_OFF]


def _deep_supervision_note(architecture: dict[str, Any], patch_size: list[int]) -> list[str]:
    """A note where nnU-Net's rounding of low-resolution target sizes shifts the targets against the network's grid."""
    # the lowest supervised level has no weight in the loss
    steps = list(cumulative_strides(architecture["arch_kwargs"]["strides"])[-3])
    if all(n % s == 0 for n, s in zip(patch_size, steps, strict=True)):
        return []
    return [
        f"Patch size {list(patch_size)} is no multiple of {steps} (the plans' order of axes): low-resolution targets "
        f"of deep supervision are off by up to half a voxel of theirs; plans of mim_plan have a patch size that fits"
    ]
