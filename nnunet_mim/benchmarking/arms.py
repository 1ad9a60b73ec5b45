"""What is compared: the arms of an experiment, found and checked before any training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from typing import Any

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_mim.benchmarking.cell import TRAIN, Arm
from nnunet_mim.benchmarking.seeded_training import installed_command
from nnunet_mim.checkpoint.finetuning import find_checkpoint, no_checkpoint_error, read_checkpoint
from nnunet_mim.checkpoint.locate import locate
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.plans import configuration_of, uses_hybrid_unet
from nnunet_mim.nnunet.source import Source, find_source
from nnunet_mim.trainers.transfer import check_architecture

MIM_PLANS = "nnUNetMiMPlans"


@dataclass(frozen=True)
class ArmSpec:
    """An arm as the user names it, for any dataset and fold."""

    name: str
    trainer: str
    plans: str
    checkpoint: str | None = None
    """a file, folder or Hugging Face name; {fold} and {dataset} in it are filled in"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of the recipe, for MiM trainers"""
    command: str = TRAIN


def known_arm(name: str, mim_plans: str = MIM_PLANS) -> ArmSpec | None:
    """An arm that a name is enough for."""
    known = {
        "MiM": ("nnUNetTrainerMiM", mim_plans),
        "Scratch": ("nnUNetTrainerMiMScratch", mim_plans),
        "nnUNet": ("nnUNetTrainer", "nnUNetPlans"),
        "ResEncL": ("nnUNetTrainer", "nnUNetResEncUNetLPlans"),
    }
    return ArmSpec(name, *known[name]) if name in known else None


KNOWN_ARMS = ("MiM", "Scratch", "nnUNet", "ResEncL")


def resolve_arm(spec: ArmSpec, dataset: str, configuration: str, fold: int) -> Arm:
    """Find an arm's data and checkpoint for one dataset and fold.

    Raises:
        MiMError: names the arm: not preprocessed, no checkpoint or one that does not fit, or a network that would
            follow from the checkpoint.
    """
    try:
        return _resolve(spec, dataset, configuration, fold)
    except MiMError as error:
        raise MiMError(f"arm {spec.name}: {error}") from error


def _resolve(spec: ArmSpec, dataset: str, configuration: str, fold: int) -> Arm:
    source = find_source(dataset, spec.plans, configuration)
    check_trainable(source, spec.trainer)
    arm = Arm(spec.name, spec.trainer, source, command=spec.command)
    given = filled_in(spec.checkpoint, fold, source.dataset) if spec.checkpoint else None
    if arm.is_mim:
        check_network(arm)
    if arm.is_control and given:
        raise MiMError(f"{spec.trainer} starts from random weights: leave the checkpoint out")
    if not arm.is_mim:
        return Arm(spec.name, spec.trainer, source, _other_checkpoint(arm, given), spec.command)
    if arm.is_control:
        return arm
    if given is None:
        where = (source.plans, source.configuration, fold, os.environ["nnUNet_results"])
        found = find_checkpoint(*where)
        if found is None:
            raise no_checkpoint_error(*where)
        given = str(found)
    stored = read_checkpoint(given)
    architecture = configuration_of(source.plans, source.configuration)["architecture"]
    check_architecture(stored, architecture["arch_kwargs"], source.in_channels)
    return Arm(spec.name, spec.trainer, source, stored.path, spec.command)


def _other_checkpoint(arm: Arm, given: str | None) -> str | None:
    """Of a trainer that is not this package's. Other commands than nnUNetv2_train take it from the plans."""
    if arm.command != TRAIN:
        if installed_command(arm.command) is None:
            raise MiMError(f"{arm.command} is not installed: install an nnU-Net that has it (see nnU-Net's page)")
        if given:
            raise MiMError(f"{arm.command} takes the checkpoint from the plans: leave it out")
        given = (arm.source.plans.get("pretrain_info") or {}).get("checkpoint_path")
    path = locate(given) if given else None
    if path is not None and path.is_dir():
        raise MiMError(f"{arm.trainer} takes a .pth file, not the folder {path}")
    return str(path) if path else None


def filled_in(checkpoint: str, fold: int, dataset: str) -> str:
    """A checkpoint's path with {fold} and {dataset} filled in. MiMError where anything else is in braces."""
    try:
        return checkpoint.format(fold=fold, dataset=dataset)
    except (KeyError, ValueError, IndexError) as error:
        raise MiMError(f"checkpoint {checkpoint}: only {{fold}} and {{dataset}} may be in braces") from error


def check_trainable(source: Source, trainer: str) -> None:
    """MiMError where nnU-Net would fail, or write elsewhere, after the training has begun."""
    if configuration_of(source.plans, source.configuration).get("previous_stage"):
        raise MiMError(f"configuration {source.configuration} needs predictions of another one first: give 3d_fullres")
    if (inner := source.plans.get("plans_name")) != source.plans_name:
        raise MiMError(f"the plans file {source.plans_name}.json calls its plans {inner}: let both be the same")
    if not is_trainer(trainer):
        raise MiMError(f"nnU-Net knows no trainer {trainer}: correct its name")


@cache
def is_trainer(name: str) -> bool:
    """Whether nnU-Net finds a trainer of this name."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():  # nnU-Net says where it looks
        warnings.simplefilter("ignore")
        try:
            recursive_find_trainer_class_by_name(name)
        except RuntimeError:
            return False
    return True


def check_network(arm: Arm) -> None:
    """Raise MiMError unless the plans name the network: otherwise it would follow from the checkpoint, and the control
    have another one.
    """
    source = arm.source
    if not uses_hybrid_unet(configuration_of(source.plans, source.configuration)):
        raise MiMError(
            f"plans {source.plans_name} name another network than that of {arm.trainer}: write plans with mim_plan -d "
            f"{source.dataset[7:10]} -pc CHECKPOINT, and give their name"
        )


def control_of(specs: Sequence[ArmSpec], given: str | None = None) -> str:
    """The arm that others are compared with: the one given, else the first control of this package, else the first
    without a checkpoint.

    Raises:
        MiMError: no arm has the given name.
    """
    names = [spec.name for spec in specs]
    if given is not None:
        if given not in names:
            raise MiMError(f"control {given} is none of the arms: {', '.join(names)}")
        return given
    own = [spec.name for spec in specs if spec.trainer.startswith("nnUNetTrainerMiMScratch")]
    without = [
        spec.name
        for spec in specs
        if spec.checkpoint is None and spec.command == TRAIN and not spec.trainer.startswith("nnUNetTrainerMiM")
    ]
    return (own + without + names[-1:])[0]
