"""Transfer of pretrained weights into the encoder of a HybridUNet. No weight is skipped silently."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnunet_mim.checkpoint.format import ENCODER_PREFIX, PretrainedCheckpoint
from nnunet_mim.config import NetworkConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import HybridUNet

INPUT_LAYER = f"{HybridUNet.keys_to_in_proj[0]}.weight".removeprefix(ENCODER_PREFIX)


@dataclass
class TransferReport:
    """Origin of every parameter of the network; names as in its state dict."""

    source: str
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    """what was done to a parameter, by name"""
    fresh: list[str] = field(default_factory=list)
    n_values: dict[str, int] = field(default_factory=dict)
    """number of values of a parameter, by name"""

    def lines(self) -> list[str]:
        """Lines for the training log: counts and names."""
        lines = [f"Pretrained weights: {self.source}"]
        for title, names in (("loaded", self.loaded), ("adapted", list(self.adapted)), ("fresh", self.fresh)):
            lines.append(f"  {title}: {len(names)} parameters, {sum(self.n_values[n] for n in names):,} values")
            lines.extend(f"    {n}{' (' + self.adapted[n] + ')' if n in self.adapted else ''}" for n in names)
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "loaded": self.loaded, "adapted": self.adapted, "fresh": self.fresh}


def check_architecture(checkpoint: PretrainedCheckpoint, arch_kwargs: dict[str, Any], in_channels: int) -> None:
    """Refuse a checkpoint that does not fit the network of the plans.

    Strides may differ (kernels are adapted), and a one-channel encoder fits any number of channels.

    Raises:
        MiMError: other widths, depths, heads or MLP ratio, or several channels that are not the dataset's.
    """
    for name in ("embed_dims", "depths", "num_heads", "mlp_ratio"):
        stored = getattr(checkpoint.network, name)
        wanted = tuple(arch_kwargs[name]) if isinstance(stored, tuple) else arch_kwargs[name]
        if stored != wanted:
            raise MiMError(
                f"checkpoint {checkpoint.path} is of another architecture ({name} {stored}, the plans have {wanted}): "
                f"write plans for it with `mim_plan -pc CHECKPOINT`"
            )
    if checkpoint.in_channels not in (1, in_channels):
        raise MiMError(
            f"checkpoint {checkpoint.path} was pretrained on {checkpoint.in_channels} channels, the dataset has "
            f"{in_channels}: pretrain on this dataset, or on one channel (which fits any number)"
        )


@torch.no_grad()
def transfer_encoder(network: HybridUNet, checkpoint: PretrainedCheckpoint) -> TransferReport:
    """Copy all pretrained encoder weights into `network.encoder`, adapted where channels or strides differ.

    Args:
        network: on any device; changed in place.
        checkpoint: of the same widths and depths (`check_architecture`).

    Raises:
        MiMError: a parameter is missing on either side, or its shape differs in a way no rule covers.
    """
    target = network.encoder.state_dict()
    missing, unexpected = sorted(set(target) - set(checkpoint.encoder)), sorted(set(checkpoint.encoder) - set(target))
    if missing or unexpected:
        raise MiMError(
            f"checkpoint {checkpoint.path} does not fit the encoder: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}"
        )
    report = TransferReport(checkpoint.path)
    for name, parameter in target.items():
        weight, done = checkpoint.encoder[name], []
        if name == INPUT_LAYER and weight.shape[1] == 1 and parameter.shape[1] > 1:
            weight = repeat_input_channel(weight, parameter.shape[1])
            done.append(f"1 → {parameter.shape[1]} input channels, repeated and divided")
        if is_patch_kernel(name) and weight.shape[2:] != parameter.shape[2:]:
            done.append(f"kernel {tuple(weight.shape[2:])} → {tuple(parameter.shape[2:])}, response kept")
            weight = resize_kernel(weight, tuple(parameter.shape[2:]))
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
    report.n_values = {name: p.numel() for name, p in network.state_dict().items()}
    report.fresh = [n for n in report.n_values if n not in report.adapted and not n.startswith(ENCODER_PREFIX)]
    accounted = len(report.loaded) + len(report.adapted) + len(report.fresh)
    assert len(report.loaded) + len(report.adapted) == len(checkpoint.encoder)
    assert accounted == len(report.n_values)
    return report


def is_patch_kernel(name: str) -> bool:
    """Whether a parameter is the weight of an encoder convolution with kernel = stride."""
    return name.endswith((".embed.proj.weight", ".to_token.weight", "token_embed.proj.weight"))


def repeat_input_channel(weight: Tensor, channels: int) -> Tensor:
    """Weight (out, 1, …) → (out, channels, …), divided so that an image in every channel gives the same response."""
    return weight.expand(-1, channels, *weight.shape[2:]) / channels


def resize_kernel(weight: Tensor, size: tuple[int, ...]) -> Tensor:
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


def describe(network: NetworkConfig) -> str:
    """Sizes of an encoder in one line, for logs."""
    sizes = f"embed_dims {network.embed_dims}, depths {network.depths}, heads {network.num_heads}"
    return f"{sizes}, token {network.token_size}"
