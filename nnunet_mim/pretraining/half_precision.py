"""A step in bfloat16: a copy of the network computes, the float32 weights learn."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from nnunet_mim.networks.mask_in_mask import HasUNet, MaskedViews, Reconstruction, Reconstructs
from nnunet_mim.pretraining.objective.losses import full


class HalfPrecisionCopy:
    """A bfloat16 copy of a network of pretraining that computes for its float32 weights.

    All activations are bfloat16, the residual streams too. LayerNorm, attention and matrix products sum in float32
    inside their kernels, and the losses are float32. Autocast would compute LayerNorm in float32 from end to end, cast
    its result, and cast every weight of every call, which makes a third of all kernels. Here weights are cast once a
    step, gradients once a pass, all by one operation.

    Args:
        network: whose weights learn.
        compiled: by torch.compile.
    """

    def __init__(self, network: nn.Module, compiled: bool = False) -> None:
        copy = deepcopy(network)
        for module in copy.modules():  # not Module.bfloat16, which cannot convert fake tensors
            for name, weight in [*module.named_parameters(recurse=False)]:
                setattr(module, name, nn.Parameter(weight.detach().bfloat16()))
        self.learning: list[Tensor] = list(network.parameters())
        self.computing: list[Tensor] = list(copy.parameters())
        self.network: Reconstructs = torch.compile(copy, dynamic=False) if compiled else copy  # type: ignore[assignment]

    def __call__(self, groups: Sequence[MaskedViews], recompute: bool = False) -> list[Reconstruction]:
        """See MaskInMask. Features, which children are compared with, are float32."""
        halves = [group._replace(images=group.images.bfloat16()) for group in groups]
        return [output._replace(features=full(output.features)) for output in self.network(halves, recompute)]

    def align(
        self, features: Tensor, edge: int | None, parent_features: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See Alignment."""
        parents = None if parent_features is None else parent_features.bfloat16()
        return self.network.align(features.mean(dim=1, keepdim=True).bfloat16(), edge, parents)

    def reconstruct_with_unet(self, groups: Sequence[MaskedViews]) -> list[Tensor]:
        """See MaskInMask."""
        network: HasUNet = self.network  # type: ignore[assignment]
        return network.reconstruct_with_unet([g._replace(images=g.images.bfloat16()) for g in groups])

    @torch.no_grad()
    def take_weights(self) -> None:
        """Before a step: copy the weights that learn."""
        torch._foreach_copy_(self.computing, self.learning)

    @torch.no_grad()
    def give_gradients(self) -> None:
        """After a pass: add its gradients to those of the weights that learn, in float32."""
        pairs = zip(self.learning, self.computing, strict=True)
        used = [(weight, copy) for weight, copy in pairs if copy.grad is not None]
        new = [torch.empty_like(weight) for weight, _ in used]
        torch._foreach_copy_(new, [copy.grad for _, copy in used])  # type: ignore[misc]
        sums = [(w.grad, gradient) for (w, _), gradient in zip(used, new, strict=True) if w.grad is not None]
        if sums:
            torch._foreach_add_([total for total, _ in sums], [gradient for _, gradient in sums])
        for (weight, copy), gradient in zip(used, new, strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad
            copy.grad = None
