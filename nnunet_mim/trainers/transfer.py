"""Initial weights of a HybridUNet: what was pretrained (no weight is skipped silently), and biases of its heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from nnunet_mim.checkpoint.format import ENCODER_PREFIX, PretrainedCheckpoint
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import HybridUNet
from nnunet_mim.nnunet.documents import checked, document
from nnunet_mim.system.untrusted import read_json

INPUT_LAYER = f"{HybridUNet.keys_to_in_proj[0]}.weight".removeprefix(ENCODER_PREFIX)
STEM_INPUTS = ("stem.conv1.0.weight", "stem.shortcut.0.weight")
HEADS = "decoder.heads."


@dataclass
class TransferReport:
    """Origin of every parameter of the network; names as in its state dict."""

    source: str
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    """what was done to a parameter, by name"""
    fresh: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    """why a pretrained parameter of the U-Net was not taken, by name; these are fresh too"""
    has_unet: bool = False
    """whether the checkpoint holds a pretrained U-Net"""
    n_values: dict[str, int] = field(default_factory=dict)
    """number of values of a parameter, by name"""

    def lines(self) -> list[str]:
        """Three lines for the training log; names are in mim_transfer.json."""
        kinds = (("loaded", self.loaded), ("adapted", list(self.adapted)), ("fresh", self.fresh))
        values = {title: sum(self.n_values[name] for name in names) for title, names in kinds}
        counts = ", ".join(f"{title}: {len(names)} ({values[title]:,} values)" for title, names in kinds)
        return [f"Pretrained weights: {self.source}", f"  parameters {counts}", f"  {self.summary()}"]

    def summary(self) -> str:
        """Which parts of the network were pretrained, in one sentence."""
        if not self.has_unet:
            return "pretrained: encoder (the checkpoint holds no U-Net, which mim_pretrain makes with --decoder unet)"
        missing = sorted({".".join(name.split(".")[:3]) for name in self.fresh if not name.startswith(HEADS)})
        without = f"; from random weights, as the checkpoint's do not fit: {', '.join(missing)}" if missing else ""
        return f"pretrained: encoder, stem, skips, bottleneck and decoder, but the heads{without}"


def check_architecture(checkpoint: PretrainedCheckpoint, arch_kwargs: dict[str, Any], in_channels: int) -> None:
    """Raise MiMError for a checkpoint that does not fit the network of the plans. Strides may differ."""
    for name in ("embed_dims", "depths", "num_heads", "mlp_ratio"):
        stored = getattr(checkpoint.network, name)
        wanted = tuple(arch_kwargs[name]) if isinstance(stored, tuple) else arch_kwargs[name]
        if stored != wanted:
            raise MiMError(
                f"checkpoint {checkpoint.path} is of another architecture ({name} {stored}, the plans have {wanted}): "
                f"write plans for it with `mim_plan -d DATASET -pc {checkpoint.path}`"
            )
    check_channels(checkpoint, in_channels)


def check_channels(checkpoint: PretrainedCheckpoint, in_channels: int) -> None:
    """Raise MiMError for several channels that are not the dataset's: one channel fits any number."""
    if checkpoint.in_channels not in (1, in_channels):
        raise MiMError(
            f"checkpoint {checkpoint.path} was pretrained on {checkpoint.in_channels} channels, the dataset has "
            f"{in_channels}: pretrain on this dataset, or on one channel (which fits any number)"
        )


@torch.no_grad()
def transfer_weights(network: HybridUNet, checkpoint: PretrainedCheckpoint) -> TransferReport:
    """Copy all pretrained weights into a network, adapted where channels or strides differ.

    Of the U-Net around the encoder, where the checkpoint has one, all that fits is taken, and no head.

    Raises MiMError where a parameter of the encoder is missing on either side, or its shape differs in a way no rule
    covers.
    """
    report = TransferReport(checkpoint.path, has_unet=bool(checkpoint.unet))
    _transfer_encoder(network, checkpoint, report)
    _transfer_unet(network, checkpoint.unet, report)
    report.n_values = {name: p.numel() for name, p in network.state_dict().items()}
    taken = {*report.loaded, *report.adapted}
    report.fresh = [name for name in report.n_values if name not in taken]
    assert len(report.loaded) + len(report.adapted) + len(report.fresh) == len(report.n_values)
    return report


def _transfer_encoder(network: HybridUNet, checkpoint: PretrainedCheckpoint, report: TransferReport) -> None:
    target = network.encoder.state_dict()
    missing, unexpected = sorted(set(target) - set(checkpoint.encoder)), sorted(set(checkpoint.encoder) - set(target))
    if missing or unexpected:
        raise MiMError(
            f"checkpoint {checkpoint.path} does not fit the encoder: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}"
        )
    for name, parameter in target.items():
        weight = checkpoint.encoder[name]
        done: list[str] = []
        if name == INPUT_LAYER and weight.shape[1] == 1 and parameter.shape[1] > 1:
            weight = _repeat_input(weight, parameter.shape[1], done)
        if _is_patch_kernel(name) and weight.shape[2:] != parameter.shape[2:]:
            done.append(f"kernel {tuple(weight.shape[2:])} → {tuple(parameter.shape[2:])}, response kept")
            weight = _resize_kernel(weight, tuple(parameter.shape[2:]))
        if weight.shape != parameter.shape:
            raise MiMError(
                f"checkpoint {checkpoint.path}: {ENCODER_PREFIX}{name} has shape {tuple(weight.shape)}, the network "
                f"wants {tuple(parameter.shape)}: another architecture"
            )
        parameter.copy_(weight)
        if done:
            report.adapted[f"{ENCODER_PREFIX}{name}"] = "; ".join(done)
        else:
            report.loaded.append(f"{ENCODER_PREFIX}{name}")


def _transfer_unet(network: HybridUNet, unet: Mapping[str, Tensor], report: TransferReport) -> None:
    for name, parameter in network.state_dict().items():
        if name.startswith((ENCODER_PREFIX, HEADS)) or not unet:
            continue
        done: list[str] = []
        weight = unet.get(name)
        if weight is not None and name in STEM_INPUTS and weight.shape[1] == 1 and parameter.shape[1] > 1:
            weight = _repeat_input(weight, parameter.shape[1], done)
        if weight is not None and name.startswith("decoder.up.") and weight.shape[:2] == parameter.shape[:2]:
            size = tuple(parameter.shape[2:])
            if weight.dim() == parameter.dim() == 5 and weight.shape[2:] != size:
                done.append(f"kernel {tuple(weight.shape[2:])} → {size}, averaged or repeated")
                weight = F.adaptive_avg_pool3d(weight, size)
        if weight is None or weight.shape != parameter.shape:
            found = "not in the checkpoint" if weight is None else f"{tuple(weight.shape)} in the checkpoint"
            report.unfit[name] = f"{found}, {tuple(parameter.shape)} here"
            continue
        parameter.copy_(weight)
        if done:
            report.adapted[name] = "; ".join(done)
        else:
            report.loaded.append(name)


def _repeat_input(weight: Tensor, channels: int, done: list[str]) -> Tensor:
    """A convolution's weight for several input channels, from that for one; what was done is added to `done`."""
    done.append(f"1 → {channels} input channels, repeated and divided")
    # divided, so that an image in every channel gives the same response
    return weight.expand(-1, channels, *weight.shape[2:]) / channels


def _is_patch_kernel(name: str) -> bool:
    """Whether a parameter is the weight of an encoder convolution with kernel = stride."""
    return name.endswith((".embed.proj.weight", ".to_token.weight", "token_embed.proj.weight"))


def _resize_kernel(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize the weight (out, in, kx, ky, kz) of a kernel = stride convolution to a new kx, ky, kz.

    Each value is spread over the cells that its voxel overlaps; sums are unchanged. A smaller kernel responds to an
    image as the original does to its nearest-neighbour enlargement, a larger one as it does to its area average.
    """
    for axis, new in enumerate(size):
        old = weight.shape[2 + axis]
        edges_old = torch.arange(old + 1, dtype=torch.float64)
        edges_new = torch.arange(new + 1, dtype=torch.float64) * old / new
        low = torch.maximum(edges_new[:-1, None], edges_old[None, :-1])
        high = torch.minimum(edges_new[1:, None], edges_old[None, 1:])
        overlap = (high - low).clamp(min=0).to(weight.dtype)  # (new, old); columns sum to 1
        weight = torch.movedim(torch.tensordot(weight, overlap, dims=([2 + axis], [1])), -1, 2 + axis)
    return weight


def start_from_prior(heads: nn.ModuleList, foreground: float, regions: bool) -> None:
    """Set the biases of the heads so that they predict about the true share of foreground.

    This is the prior of RetinaNet (arXiv 1708.02002) for a softmax. AdamW moves a bias by about the learning rate per
    step, so short trainings would need hundreds of steps to learn that most voxels are background
    (benchmarks/results/2026-11-26_head_prior_cpu.md). Weights are not changed: RetinaNet's small ones slow the start.

    Args:
        heads: 1x1x1 convolutions; their outputs are classes (background first) or regions.
        foreground: probability of all foreground classes together, or of each region; above 0 and below 1.
        regions: whether outputs are regions with a sigmoid each, without background.
    """
    for head in heads:
        assert isinstance(head, nn.Conv3d)
        assert head.bias is not None
        nn.init.zeros_(head.bias)
        classes = head.out_channels - 1
        odds = foreground / (1 - foreground)
        if regions:
            nn.init.constant_(head.bias, math.log(odds))
        elif classes:
            nn.init.constant_(head.bias[:1], math.log(classes / odds))


@document
class TransferRecord(TypedDict):
    """What is needed of mim_transfer.json."""

    source: str
    leaked_cases: list[str]
    probably_leaked_cases: NotRequired[dict[str, str]]
    n_val_cases: Annotated[int, Field(ge=0, le=1_000_000_000)]


TRANSFER_RECORD = TypeAdapter(TransferRecord)


def read_record(path: Path) -> dict[str, Any]:
    """The content of mim_transfer.json. Raises MiMError for one that cannot be used."""
    return checked(str(path), read_json(path, "delete it"), TRANSFER_RECORD, "delete it")
