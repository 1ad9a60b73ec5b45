"""The checkpoint: what is in it, its one writer and its one loader (docs/checkpoint.md)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

import nnunet_mim
from nnunet_mim.checkpoint.case_list import put_aside, put_back
from nnunet_mim.checkpoint.locate import FINAL, UNPICKLED, lasting_name, locate
from nnunet_mim.checkpoint.metadata import check_provenance
from nnunet_mim.checkpoint.share import read_export
from nnunet_mim.checkpoint.torch_file import check_tensors, read_torch_file
from nnunet_mim.config import ALIGNMENTS, NetworkConfig, PretrainConfig, check_view_size, network_from_dict
from nnunet_mim.errors import MiMError, printable
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.networks.resenc import ResEncMaskInMask, check_resenc, number_of_blocks
from nnunet_mim.nnunet.source import Source
from nnunet_mim.system.files import atomic_file

HYBRID_KEYS = {
    "key_to_encoder": HybridUNet.key_to_encoder,
    "key_to_stem": HybridUNet.key_to_stem,
    "keys_to_in_proj": list(HybridUNet.keys_to_in_proj),
    "key_to_lpe": HybridUNet.key_to_lpe,
}
RESENC_KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
    "key_to_lpe": None,
}
"""where the parts of the two networks are, for the finetuning of nnU-Net's development branch"""

ENCODER_PREFIX = f"{HybridUNet.key_to_encoder}."
UNET_PREFIX = "unet."
"""of what learns by --decoder unet: a HybridUNet without its encoder, and what stands for masked places"""

CITATIONS = [
    "Zhuang et al., MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image Analysis, arXiv:2404.15580",
    "Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, "
    "Nature Methods 18, 203-211 (2021)",
]


def build_checkpoint(
    weights: Mapping[str, Tensor], config: PretrainConfig, provenance: dict[str, Any]
) -> dict[str, Any]:
    """The content of a checkpoint, of types that `torch.load(weights_only=True)` accepts.

    Args:
        weights: state dict of the network of pretraining.
        config: settings of the run.
        provenance: as of `run_provenance`.
    """
    resenc = config.encoder == "resenc"
    block = config.architecture if resenc else plans_architecture(config.network, config.view_size)
    copies: dict[tuple[int, int], Tensor] = {}  # nnU-Net's networks have some weights under two names
    for value in weights.values():
        copies.setdefault((value.data_ptr(), value.numel()), value.detach().cpu())
    return {
        "network_weights": {name: copies[value.data_ptr(), value.numel()] for name, value in weights.items()},
        "nnssl_adaptation_plan": {
            "architecture_plans": {  # for a patch as large as a view, in the format of nnU-Net's development branch
                "arch_class_name": block["network_class_name"],
                "arch_kwargs": block["arch_kwargs"],
                "arch_kwargs_requiring_import": list(block["_kw_requires_import"]),
            },
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
            **(RESENC_KEYS if resenc else HYBRID_KEYS),
            "citations": CITATIONS,
        },
        "mim_config": config.to_dict(),
        "mim_version": nnunet_mim.__version__,
        "provenance": provenance,
    }


def run_provenance(
    sources: list[Source], seen: list[dict[str, str]], fold: int | str, iteration: int, history: list[dict[str, float]]
) -> dict[str, Any]:
    """Where the weights of a run come from, as stored under `provenance`.

    Args:
        sources: datasets, all in the units of the first.
        seen: records (`Cases.records`) of every case that the weights were trained on.
        fold: left-out fold, or `all`.
        iteration: number of optimiser steps.
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


def save_atomically(checkpoint: dict[str, Any], path: Path, afterwards: str = "repeat the command") -> None:
    """Write a checkpoint so that `path` holds either the former file or the whole new one; a long list of cases goes
    into a file beside it, see `put_aside`. `afterwards` is what a user does once there is space.

    Raises:
        MiMError: the disk is full or not writable; the former file is left as it was.
    """
    temporary = path.with_name(path.name + ".tmp")  # one name, so that killed runs do not fill the disk
    try:
        if "provenance" in checkpoint:
            checkpoint = {**checkpoint, "provenance": put_aside(checkpoint["provenance"], path.parent)}
        with atomic_file(path, temporary) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        raise MiMError(f"cannot write {path} ({error}): free some disk space and {afterwards}") from error


def load_checkpoint(path: str | Path, provenance_required: bool = True) -> dict[str, Any]:
    """Load a checkpoint of `mim_pretrain` or an export, and check that it holds the weights of the network it declares.

    Args:
        path: file, folder of `mim_export`, or name of a repository, see `locate`.
        provenance_required: refuse a checkpoint without `provenance`; otherwise it is empty then.

    Raises:
        MiMError: missing, damaged, unsafe, or not a checkpoint of this package.
    """
    path = locate(path)
    stored = read_safely(path)
    if isinstance(stored, dict) and not provenance_required:
        stored["provenance"] = stored.get("provenance") or {}
    needed = ("network_weights", "mim_config", "provenance")
    missing = [key for key in needed if not isinstance(stored, dict) or not isinstance(stored.get(key), dict)]
    if missing:
        raise MiMError(
            f"{path} was not written by mim_pretrain, it lacks {', '.join(missing)}: give the {FINAL} of a "
            "mim_pretrain run"
        )
    weights, config = stored["network_weights"], stored["mim_config"]
    if not is_state_dict(weights):
        raise MiMError(f"{path}: network_weights are not tensors by name: give the {FINAL} of a mim_pretrain run")
    try:
        int(config["in_channels"])
        check_view_size(config["view_size"])
        declared = _declared_weights(config, len(weights))
    except Exception as error:  # the settings are anybody's, and so are nnU-Net's errors about its network
        raise MiMError(
            f"{path}: mim_config cannot be used ({type(error).__name__}: {printable(error)}): give the {FINAL} of a "
            "mim_pretrain run of this version of nnunet_mim"
        ) from error
    check_weights(path, weights, declared)
    check_provenance(stored["provenance"], str(path))
    return stored


def read_safely(path: Path) -> Any:
    """Read a file of `torch.save` or an export without executing anything in it; every byte's checksum is verified.

    Raises:
        MiMError: damaged, or it holds more than plain values and dense tensors of finite numbers, or its list of cases
            is missing.
    """
    stored = read_export(path) if path.is_dir() else read_torch_file(path)
    if path.is_dir():
        check_tensors(path, stored)
    if isinstance(stored, dict) and isinstance(stored.get("provenance"), dict):
        stored["provenance"] = put_back(stored["provenance"], path, path if path.is_dir() else path.parent)
    return stored


def _declared_weights(config: Mapping[str, Any], n_weights: int) -> dict[str, Tensor]:
    """The weights, without values, of the network that settings declare. Raises whatever is wrong with them.

    Args:
        config: `mim_config` of a checkpoint.
        n_weights: number of tensors in it: no network of more blocks is built.
    """
    network, in_channels = network_from_dict(config["network"]), int(config["in_channels"])
    alignment, resenc = config.get("alignment", ALIGNMENTS[0]), config.get("encoder", "hybrid") == "resenc"
    n_blocks = sum(network.depths) + network.decoder_depth
    if resenc:
        check_resenc(config["architecture"])
        n_blocks = number_of_blocks(config["architecture"])
    if n_blocks > n_weights:
        raise MiMError(f"{n_blocks} blocks, and {n_weights} tensors")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about sizes that the checks refuse afterwards
        if resenc:
            size = network.token_size
            return ResEncMaskInMask(config["architecture"], size, in_channels, alignment).state_dict()
        unet = None
        if config.get("decoder") == "unet":
            unet = plans_architecture(network, tuple(int(n) for n in config["view_size"]))["arch_kwargs"]
        return MaskInMask(network, in_channels, alignment=alignment, unet=unet).state_dict()


def check_weights(
    path: Path, weights: Mapping[str, Tensor], declared: Mapping[str, Tensor], settings: str = "mim_config",
    remedy: str = f"give the {FINAL} of a mim_pretrain run",
) -> None:  # fmt: skip
    """Raise MiMError, naming the first, unless there is every declared weight and no other, with its shape and kind.

    `settings` is what declares them.
    """
    if missing := [name for name in declared if name not in weights]:
        raise MiMError(f"{path} lacks the tensor {missing[0]} ({len(missing)} in all) of its network: {remedy}")
    for name, weight in weights.items():
        if (wanted := declared.get(name)) is None:
            raise MiMError(f"{path}: tensor {printable(name)} is not of the network in {settings}: {remedy}")
        if weight.shape != wanted.shape or weight.is_floating_point() != wanted.is_floating_point():
            found, right = (f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (weight, wanted))
            raise MiMError(f"{path}: tensor {name} is {found}, and {settings} declares {right}: {remedy}")


def is_state_dict(value: Any) -> TypeGuard[dict[str, Tensor]]:
    """Whether a value is a dict of tensors by name."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def settings_of(checkpoint: Mapping[str, Any], path: Path | str) -> PretrainConfig:
    """The settings of the run that a checkpoint is of. Raises MiMError, naming the file, where they cannot be."""
    try:
        return PretrainConfig.from_dict(checkpoint["mim_config"])
    except MiMError as error:
        raise MiMError(f"{path}, mim_config: {error}") from error


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """What finetuning takes from a checkpoint: the hybrid encoder, the U-Net around it, and where they come from."""

    path: str
    network: NetworkConfig
    preset: str
    in_channels: int
    view_size: tuple[int, ...]
    encoder: dict[str, Tensor] = field(repr=False)
    """parameters of HybridEncoder, without the `encoder.` prefix"""
    provenance: dict[str, Any] = field(repr=False)
    """datasets, spacing (mm), normalization, cases, …, see `run_provenance`; keys may be missing in old checkpoints"""
    unet: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """parameters of a HybridUNet but its encoder, without the `unet.` prefix; empty where only the encoder learnt"""

    @property
    def unet_widths(self) -> dict[str, Any]:
        """Arguments of HybridUNet that decide the shapes in `unet`; empty where there are none."""
        first, *skips = ("stem.conv1.0.weight", *(f"skips.{stage}.0.weight" for stage in range(4)))
        if not {first, *skips} <= set(self.unet):
            return {}
        convs = [name for name in self.unet if re.fullmatch(r"decoder\.blocks\.0\.\d+\.0\.weight", name)]
        return {
            "stem_features": len(self.unet[first]),
            "decoder_features": [len(self.unet[name]) for name in skips],
            "n_conv_per_stage_decoder": len(convs),
        }

    @classmethod
    def load(cls, path: str | Path) -> PretrainedCheckpoint:
        """Load a checkpoint to finetune from. Raises MiMError as `load_checkpoint`, or without a hybrid encoder."""
        path = locate(path)
        stored = load_checkpoint(path, provenance_required=False)
        config, weights = stored["mim_config"], stored["network_weights"]
        if config.get("encoder", "hybrid") != "hybrid":
            raise MiMError(
                f"{path} holds nnU-Net's residual encoder U-Net, not the encoder of nnUNetTrainerMiM: train stock "
                f"nnU-Net with the plans of the pretraining, nnUNetv2_train DATASET 3d_fullres FOLD -p PLANS "
                f"-pretrained_weights {path} ({UNPICKLED})"
            )
        encoder, unet = (
            {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            for prefix in (ENCODER_PREFIX, UNET_PREFIX)
        )
        if not encoder:
            raise MiMError(
                f"{path} holds no parameters named {ENCODER_PREFIX}*: give the {FINAL} of a mim_pretrain run"
            )
        return cls(
            path=lasting_name(path),
            network=network_from_dict(config["network"]),
            preset=str(config.get("preset", "custom")),
            in_channels=int(config["in_channels"]),
            view_size=tuple(config["view_size"]),
            encoder=encoder,
            provenance=stored["provenance"],
            unet=unet,
        )
