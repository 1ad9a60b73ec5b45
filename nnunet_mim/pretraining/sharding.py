"""Weights and optimiser state of a run, whole on every rank or spread over the ranks (FSDP)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.distributed.ranks import Ranks


def shard(model: PretrainingNetwork, ranks: Ranks, device: torch.device) -> None:
    """Spread weights, gradients and optimiser state over the ranks, in place; the backward pass averages gradients."""
    assert isinstance(model, MaskInMask), "--shard is for the hybrid encoder"
    mesh = init_device_mesh(device.type, (ranks.world,))
    for module in (*model.encoder.stages, *model.encoder.vit_blocks, *model.decoder.blocks, model):
        fully_shard(module, mesh=mesh)


def sum_gradients(model: nn.Module, ranks: Ranks, sharded: bool) -> None:
    """Turn every rank's gradients into their sum over ranks. The same parameters have one on every rank."""
    if sharded:
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], float(ranks.world))
    else:
        ranks.sum_all([p.grad for p in model.parameters() if p.grad is not None])


def whole(x: Tensor) -> Tensor:
    """The tensor that the ranks hold parts of; any other tensor as it is. All ranks call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the whole model, on every rank. All ranks call it."""
    return {name: whole(value.detach()) for name, value in model.state_dict().items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """State by parameter name, whole, on the CPU: can be loaded on any number of ranks. All ranks call it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: whole(value).detach().cpu().clone() for key, value in state.items()}
        for parameter, state in optimizer.state.items()
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: dict[str, dict[str, Tensor]]
) -> None:
    """Inverse of `optimizer_state`."""
    for name, parameter in model.named_parameters():
        if name in stored:
            optimizer.state[parameter] = {key: _placed_like(value, parameter) for key, value in stored[name].items()}


def _placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    value = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor) and value.ndim:  # the step counter is whole everywhere
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
