"""Finding and reading the pretraining checkpoint that a finetuning run starts from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_mim.checkpoint.locate import locate, read_pointer, read_shared
from nnunet_mim.config import NetworkConfig, network_from_dict
from nnunet_mim.errors import MiMError

ENV_CHECKPOINT = "nnUNet_mim_checkpoint"
ENCODER_PREFIX = "encoder."


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """What finetuning needs of a `mim_pretrain` checkpoint."""

    path: str
    network: NetworkConfig
    preset: str
    in_channels: int
    view_size: tuple[int, ...]
    encoder: dict[str, Tensor] = field(repr=False)
    """parameters of HybridEncoder, without the `encoder.` prefix"""
    provenance: dict[str, Any] = field(repr=False)
    """datasets, spacing (mm), normalization, intensity_properties, iterations, cases with their voxel hashes, …"""


def find_checkpoint(plans: dict[str, Any], configuration: str, fold: int | str, results: str | Path) -> Path | None:
    """Where a fresh finetuning run takes its encoder from; first hit wins.

    The environment variable nnUNet_mim_checkpoint, `plans["pretrain_info"]["checkpoint_path"]`, then the finished
    `mim_pretrain` run on this dataset (alone or with others), plans and configuration that left out this fold (or used
    all cases).

    Args:
        plans: content of the plans file.
        configuration: e.g. 3d_fullres.
        fold: number or "all".
        results: the nnUNet_results folder.

    Returns:
        None where nothing was named and no finished run exists.

    Raises:
        MiMError: a named file is missing, or several tagged runs match.
    """
    named = [
        (os.environ.get(ENV_CHECKPOINT), f"environment variable {ENV_CHECKPOINT}"),
        ((plans.get("pretrain_info") or {}).get("checkpoint_path"), "pretrain_info in the plans file"),
    ]
    for path, source in named:
        if path:
            try:
                return locate(path)
            except MiMError as error:
                raise MiMError(f"{error} ({source}): correct or remove the path") from error
    for name in dict.fromkeys((f"fold_{fold}", "fold_all")):
        runs = {run: final_checkpoint(run / name) for run in _pretraining_runs(plans, configuration, results)}
        found = {run: path for run, path in runs.items() if path is not None}
        untagged = [path for run, path in found.items() if run.name.startswith("MiMPretrain__")]
        fitting = untagged or list(found.values())
        if len(fitting) > 1:
            shown = ", ".join(map(str, fitting))
            raise MiMError(f"several pretraining runs fit ({shown}): choose one, {ENV_CHECKPOINT}=CHECKPOINT")
        if fitting:
            return fitting[0]
    return None


def final_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a finished run: in its folder, or in that of another dataset which was pretrained on too; of
    both the newer one.
    """
    own = folder / "checkpoint_final.pth"
    found = [path for path in (own if own.is_file() else None, read_pointer(folder)) if path is not None]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def no_checkpoint_error(plans: dict[str, Any], configuration: str, fold: int | str, results: str | Path) -> MiMError:
    """The error for a run that has no checkpoint to start from: says what to do, and what was found instead."""
    runs = _pretraining_runs(plans, configuration, results)
    other = sorted(str(path) for run in runs for path in run.glob("fold_*/checkpoint_*.pth"))
    dataset, plans_name = plans["dataset_name"], plans["plans_name"]
    hint = f" (not used, of another fold or unfinished: {', '.join(other)})" if other else ""
    fold_option = "" if fold == "all" else f" -f {fold}"
    command = f"mim_pretrain -d {dataset[7:10]} -p {plans_name} -c {configuration}{fold_option}"
    return MiMError(
        f"no pretraining checkpoint for {dataset}, {plans_name}, {configuration}, fold {fold}{hint}: run `{command}`, "
        f"or set {ENV_CHECKPOINT}=CHECKPOINT, or write plans with `mim_plan -pc CHECKPOINT`; without pretraining use "
        f"-tr nnUNetTrainerMiMScratch"
    )


def read_checkpoint(path: str | Path) -> PretrainedCheckpoint:
    """Load and check a pretraining checkpoint; no code in the file is run (`weights_only`, or safetensors).

    Args:
        path: anything that `locate` takes.

    Raises:
        MiMError: missing, unreadable, truncated, not written by mim_pretrain, or inconsistent.
    """
    path = locate(path)
    try:
        stored = read_shared(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
    except MiMError:
        raise
    except Exception as error:
        raise MiMError(
            f"cannot read {path} as a pretraining checkpoint ({type(error).__name__}: truncated, or not written by "
            f"mim_pretrain): pretrain again or copy the file again"
        ) from error
    if not isinstance(stored, dict) or not {"network_weights", "mim_config"} <= set(stored):
        raise MiMError(
            f"{path} is not a pretraining checkpoint (no network_weights and mim_config in it): give the "
            f"checkpoint_final.pth of a mim_pretrain run"
        )
    config, weights = stored["mim_config"], stored["network_weights"]
    try:
        network = network_from_dict(config["network"])
        in_channels, view_size = int(config["in_channels"]), tuple(config["view_size"])
    except (KeyError, TypeError) as error:
        raise MiMError(f"{path}: incomplete mim_config ({error}): written by another version of nnunet_mim") from error
    if config.get("encoder", "hybrid") != "hybrid":
        raise MiMError(
            f"{path} holds nnU-Net's residual encoder U-Net, not the encoder of nnUNetTrainerMiM: train stock nnU-Net "
            f"with the plans it was pretrained with, nnUNetv2_train … -pretrained_weights {path}"
        )
    encoder = {k.removeprefix(ENCODER_PREFIX): v for k, v in weights.items() if k.startswith(ENCODER_PREFIX)}
    if not encoder:
        raise MiMError(f"{path} holds no parameters named {ENCODER_PREFIX}*: give the checkpoint of a mim_pretrain run")
    preset, provenance = str(config.get("preset", "custom")), stored.get("provenance") or {}
    return PretrainedCheckpoint(str(path), network, preset, in_channels, view_size, encoder, provenance)


def _pretraining_runs(plans: dict[str, Any], configuration: str, results: str | Path) -> list[Path]:
    pattern = f"MiMPretrain*__{plans['plans_name']}__{configuration}"
    return sorted(Path(results, plans["dataset_name"]).glob(pattern))
