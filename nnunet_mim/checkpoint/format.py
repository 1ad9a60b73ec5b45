"""Writing and reading checkpoints: the contract between pretraining and finetuning (docs/checkpoint.md)."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nnunet_mim
from nnunet_mim.checkpoint.locate import locate, read_shared
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.nnunet.source import Source

LATEST = "checkpoint_latest.pth"
"""of a run that is not finished: with everything needed to continue it"""
BEST = "checkpoint_best.pth"
"""weights with the lowest loss on held-out cases"""
FINAL = "checkpoint_final.pth"

HYBRID_KEYS = {
    "key_to_encoder": "encoder",
    "key_to_stem": "encoder.stages.0.embed",
    "keys_to_in_proj": ["encoder.stages.0.embed.proj"],
}
RESENC_KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
}
"""where the parts of the networks are, for nnU-Net's code that finetunes"""

CITATIONS = [
    "Zhuang et al., MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image Analysis, arXiv:2404.15580",
    "Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, "
    "Nature Methods 18, 203-211 (2021)",
]


def build_checkpoint(
    weights: Mapping[str, Tensor], config: PretrainConfig, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Everything a finetuning run needs, of types that `torch.load(weights_only=True)` accepts.

    Args:
        weights: state dict of the bare MaskInMask.
        config: of the run.
        provenance: where the weights come from, see `run_provenance`.
    """
    settings = config.to_dict()
    copies: dict[tuple[int, int], Tensor] = {}  # nnU-Net's networks have some weights under two names
    for value in weights.values():
        copies.setdefault((value.data_ptr(), value.numel()), value.detach().cpu())
    return {
        "network_weights": {name: copies[value.data_ptr(), value.numel()] for name, value in weights.items()},
        "nnssl_adaptation_plan": {
            "architecture_plans": _architecture_plans(config),
            "pretrain_plan": {
                "plans_name": provenance["plans_name"],
                "dataset_name": (provenance["datasets"] or [""])[0],
                "configurations": {
                    provenance["configuration"]: {
                        "patch_size": list(config.view_size),
                        "spacing": list(provenance["spacing"]),
                        "normalization_schemes": list(provenance["normalization"]),
                    }
                },
            },
            "pretrain_num_input_channels": config.in_channels,
            "recommended_downstream_patchsize": list(config.view_size),
            **(RESENC_KEYS if config.encoder == "resenc" else HYBRID_KEYS),
            "key_to_lpe": None,
            "citations": CITATIONS,
        },
        "mim_config": settings,
        "mim_version": nnunet_mim.__version__,
        "provenance": provenance,
    }


def _architecture_plans(config: PretrainConfig) -> dict[str, Any]:
    """The network that finetunes, of a patch as large as a view, in the words of nnU-Net's development branch."""
    resenc = config.encoder == "resenc"
    block = config.architecture if resenc else plans_architecture(config.network, config.view_size)
    return {
        "arch_class_name": block["network_class_name"],
        "arch_kwargs": block["arch_kwargs"],
        "arch_kwargs_requiring_import": list(block["_kw_requires_import"]),
    }


def run_provenance(
    sources: list[Source], seen: list[dict[str, str]], fold: int | str, iteration: int, history: list[dict[str, float]]
) -> dict[str, Any]:
    """What a checkpoint says about where its weights come from.

    Args:
        sources: datasets, all in the units of the first.
        seen: records of every case that the weights were trained on, see `case_records`.
        fold: left-out fold, or `all`.
        iteration: optimiser steps done.
        history: logged figures, oldest first.
    """
    first = sources[0]
    return {
        "datasets": [source.dataset for source in sources],
        "plans_name": first.plans_name,
        "configuration": first.configuration,
        "fold": fold,
        "spacing": list(first.spacing),
        "transpose_forward": list(first.plans.get("transpose_forward", (0, 1, 2))),
        "image_reader_writer": first.plans.get("image_reader_writer", ""),
        "normalization": list(first.normalization),
        "intensity_properties": first.intensity_properties,
        "iterations": iteration,
        "loss_history": history,
        "cases": seen,
    }


def save_atomically(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds either the former file or the whole new one.

    Raises:
        MiMError: the disk is full or not writable; the former file is left as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise MiMError(f"cannot write {path} ({error}): free some disk space and continue with --c") from error


def _sync_folder(folder: Path) -> None:
    """Make the new name of a file last over a loss of power."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `mim_pretrain` without executing anything in it, and check every byte's checksum.

    Args:
        path: anything that `locate` takes.

    Raises:
        MiMError: missing, truncated, unsafe, or not a checkpoint of this package.
    """
    path = locate(path)
    try:
        if path.is_dir():
            return read_shared(path)
        if zipfile.is_zipfile(path) and (broken := zipfile.ZipFile(path).testzip()):
            raise MiMError(f"{path} is damaged ({broken} has another checksum): take another copy")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MiMError:
        raise
    except Exception as error:
        raise MiMError(
            f"{path} is no readable checkpoint: truncated, or it holds more than tensors and plain values "
            f"({type(error).__name__}); take another copy or an earlier checkpoint"
        ) from error
    if not isinstance(checkpoint, dict) or not {"network_weights", "mim_config", "provenance"} <= set(checkpoint):
        raise MiMError(f"{path} was not written by mim_pretrain: it lacks network_weights, mim_config or provenance")
    return checkpoint
