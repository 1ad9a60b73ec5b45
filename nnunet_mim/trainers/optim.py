"""AdamW with layer-wise learning rates, and its schedule."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from nnunet_mim.checkpoint.format import ENCODER_PREFIX
from nnunet_mim.networks.resenc import ResEncMaskInMask
from nnunet_mim.trainers.finetune_config import FinetuneConfig


def lr_factor(iteration: int, total: int, config: FinetuneConfig, encoder: bool = True) -> float:
    """Learning rate at an iteration, as a share of the peak.

    It rises linearly from 1/w to 1 over w = round(total * warmup_fraction) iterations, then falls to 0 at `total`
    (cosine or poly). With `decoder_first_fraction` a first phase comes before that: 0 for the encoder, a linear rise to
    1 for all else.

    Args:
        iteration: number of optimiser steps already done, 0 … total - 1.
        encoder: whether this is the rate of the encoder, or of all else.
    """
    first = round(total * config.decoder_first_fraction)
    if iteration < first:
        return 0.0 if encoder else (iteration + 1) / first
    iteration, total = iteration - first, total - first
    warmup = round(total * config.warmup_fraction)
    if iteration < warmup:
        return (iteration + 1) / warmup
    progress = min(1.0, (iteration - warmup) / max(1, total - warmup))
    if config.schedule == "poly":
        return (1 - progress) ** 0.9
    return 0.5 * (1 + math.cos(math.pi * progress))


class IterationSchedule:
    """Sets the learning rate of every group from the global iteration, so that `--c` needs no saved state.

    The groups of the optimiser may have an `lr_scale`, and `encoder` (whether they belong to it).
    """

    def __init__(self, optimizer: Optimizer, config: FinetuneConfig) -> None:
        self.optimizer = optimizer
        self.config = config
        self.iteration = 0
        self.step(0)

    def step(self, epoch: int) -> None:
        """Jump to the start of an epoch (nnU-Net calls this before each one)."""
        self.iteration = epoch * self.config.iterations_per_epoch
        self._apply()

    def advance(self) -> None:
        """Set the rate of the optimiser step that comes next, and count it."""
        self._apply()
        self.iteration += 1

    def _apply(self) -> None:
        total = self.config.num_epochs * self.config.iterations_per_epoch
        for group in self.optimizer.param_groups:
            factor = lr_factor(self.iteration, total, self.config, group.get("encoder", False))
            group["lr"] = self.config.lr * factor * group.get("lr_scale", 1.0)


def _depth_from_end(name: str, encoder: nn.Module) -> int:
    """Number of layers between a parameter of an encoder and its end.

    Layers of HybridEncoder: three stages, token embedding, transformer blocks, final norm. Those of nnU-Net's residual
    encoder: stem and stages. A name is `stages.1.blocks.0.conv1.weight`, for example.
    """
    parts = name.split(".")
    if isinstance(encoder, ResEncMaskInMask):
        stages = len(encoder.encoder.stages)
        return stages - 1 - int(parts[2]) if parts[1] == "stages" else stages
    n_vit_blocks = len(encoder.vit_blocks)  # type: ignore[arg-type]
    layers = {"token_embed": 3, "token_proj": 3, "norm": 4 + n_vit_blocks}
    if parts[0] == "stages":
        layer = int(parts[1])
    elif parts[0] == "vit_blocks":
        layer = 4 + int(parts[1])
    elif parts[0] in layers:
        layer = layers[parts[0]]
    else:
        raise ValueError(f"encoder parameter {name} belongs to no known layer")
    return 4 + n_vit_blocks - layer


def _parameter_groups(network: nn.Module, config: FinetuneConfig) -> list[dict]:
    """AdamW groups of a network with an `encoder`, which hold every trainable parameter once.

    They differ in `encoder`, `lr_scale` (layer_decay ** distance from the encoder's end; 1 outside it) and weight decay
    (0 for 1-d parameters). The first group, whose rate nnU-Net logs, is outside the encoder.
    """
    groups: dict[tuple[bool, float, float], dict] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, encoder = 1.0, name.startswith(ENCODER_PREFIX)
        if encoder:
            distance = _depth_from_end(name.removeprefix(ENCODER_PREFIX), network.encoder)  # type: ignore[arg-type]
            scale = config.layer_decay**distance
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        new = {"params": [], "lr_scale": scale, "weight_decay": decay, "encoder": encoder}
        groups.setdefault((encoder, scale, decay), new)["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: (group["encoder"], -group["lr_scale"], -group["weight_decay"]))


def build_optimizer(network: nn.Module, config: FinetuneConfig) -> tuple[AdamW, IterationSchedule]:
    """AdamW that clips gradients before each step, and its schedule; on a GPU a step is one kernel."""
    on_gpu = next(network.parameters()).is_cuda
    optimizer = AdamW(_parameter_groups(network, config), lr=config.lr, fused=on_gpu or None)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: object) -> None:
        # nnU-Net's own training step unscales the gradients and clips at 12 before it gets here.
        nn.utils.clip_grad_norm_(parameters, config.grad_clip)

    optimizer.register_step_pre_hook(clip)
    return optimizer, IterationSchedule(optimizer, config)
