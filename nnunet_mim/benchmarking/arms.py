"""What is compared: the arms of an experiment, found and checked before any training."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_mim.benchmarking.bench_file import TRAIN, ArmSpec
from nnunet_mim.benchmarking.cell import Arm
from nnunet_mim.benchmarking.seeded_training import installed_command
from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.checkpoint.locate import find_checkpoint, locate, no_checkpoint_error
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.plans import configuration_of, uses_hybrid_unet
from nnunet_mim.nnunet.source import Source, find_source
from nnunet_mim.trainers.transfer import check_architecture


def resolve_arm(spec: ArmSpec, dataset: str, configuration: str, fold: int) -> Arm:
    """Find an arm's data and checkpoint for one dataset and fold.

    Raises MiMError with the arm's name where it is not preprocessed, has no checkpoint or one that does not fit, or its
    network would follow from the checkpoint, so that the control had another one.
    """
    try:
        return _resolve(spec, dataset, configuration, fold)
    except MiMError as error:
        raise MiMError(f"arm {spec.name}: {error}") from error


def _resolve(spec: ArmSpec, dataset: str, configuration: str, fold: int) -> Arm:
    source = find_source(dataset, spec.plans, configuration)
    if (inner := source.plans.get("plans_name")) != source.plans_name:
        raise MiMError(f"the plans file {source.plans_name}.json calls its plans {inner}: let both be the same")
    config = configuration_of(source.plans, source.configuration)
    if not _is_trainer(spec.trainer):
        raise MiMError(f"nnU-Net knows no trainer {spec.trainer}: correct its name")
    given = None
    if spec.checkpoint:
        try:
            given = spec.checkpoint.format(fold=fold, dataset=source.dataset)
        except (KeyError, ValueError, IndexError) as error:
            raise MiMError(f"checkpoint {spec.checkpoint}: only {{fold}} and {{dataset}} may be in braces") from error
    if not spec.is_mim:
        return Arm(spec, source, _stock_checkpoint(spec, source, given))
    if not uses_hybrid_unet(config):
        remedy = f"write plans with mim_plan -d {source.dataset[7:10]} -pc CHECKPOINT, and give their name"
        raise MiMError(f"plans {source.plans_name} name another network than that of {spec.trainer}: {remedy}")
    if spec.is_control:
        if given:
            raise MiMError(f"{spec.trainer} starts from random weights: leave the checkpoint out")
        return Arm(spec, source)
    if given is None:
        where = (source.plans, source.configuration, fold, os.environ["nnUNet_results"])
        found = find_checkpoint(*where)
        if found is None:
            raise no_checkpoint_error(*where)
        given = str(found)
    stored = PretrainedCheckpoint.load(given)
    check_architecture(stored, config["architecture"]["arch_kwargs"], source.in_channels)
    return Arm(spec, source, stored.path)


def _stock_checkpoint(spec: ArmSpec, source: Source, given: str | None) -> str | None:
    """The checkpoint of a trainer that is not this package's: the given one; for nnUNetv2_train_pretrained that of the
    plans.
    """
    if spec.command != TRAIN:
        if installed_command(spec.command) is None:
            raise MiMError(f"{spec.command} is not installed: install an nnU-Net that has it (see nnU-Net's page)")
        given = (source.plans.get("pretrain_info") or {}).get("checkpoint_path")
    path = locate(given) if given else None
    if path is not None and path.is_dir():
        raise MiMError(f"{spec.trainer} takes a .pth file, not the folder {path}")
    return str(path) if path else None


@cache
def _is_trainer(name: str) -> bool:
    """Whether nnU-Net finds a trainer of this name."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():  # nnU-Net says where it looks
        warnings.simplefilter("ignore")
        try:
            recursive_find_trainer_class_by_name(name)
        except RuntimeError:
            return False
    return True


def control_of(specs: Sequence[ArmSpec], given: str | None = None) -> str:
    """Name of the arm that others are compared with: the given one, else the first control of this package, else the
    first arm without a checkpoint, else the last one. MiMError where no arm has the given name.
    """
    names = [spec.name for spec in specs]
    if given is not None:
        if given not in names:
            raise MiMError(f"control {given} is none of the arms: {', '.join(names)}")
        return given
    controls = [spec.name for spec in specs if spec.is_control]
    stock = [spec.name for spec in specs if not (spec.checkpoint or spec.nnssl_plans or spec.is_mim)]
    return (controls + stock + names[-1:])[0]
