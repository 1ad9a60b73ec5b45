"""The processes of a run, one a device: which part of the batch each computes, and what they tell each other.

A batch is that of all ranks together. Rank r of W computes its r-th part with the random numbers that one process would
have used for it, losses are shares of the mean over the whole batch, and gradients are summed: the result does not
depend on the number of ranks (but for rounding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """One process among `world`. Alone, every method returns what it is given."""

    rank: int = 0
    world: int = 1

    def draw(self, n: int, size: int, device: torch.device, generator: torch.Generator) -> Tensor:
        """(n, size) uniform random numbers: this rank's rows of those drawn for the views of all ranks."""
        everyone = torch.rand(self.world * n, size, device=device, generator=generator)
        return everyone[self.rank * n : (self.rank + 1) * n]

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        if self.world == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, x: Tensor) -> Tensor:
        """(n, …) of every rank → (world * n, …) in the order of ranks, without gradient."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank. Waits for all of them."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the ranks' numbers. Waits for all of them."""
        if self.world == 1:
            return number
        smallest = torch.tensor(number, device=device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def sum_all(self, tensors: list[Tensor]) -> None:
        """Replace every tensor by its sum over ranks, in one message."""
        if self.world == 1:
            return
        total = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(total)
        parts = total.split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [p.view_as(x) for p, x in zip(parts, tensors, strict=True)])


ALONE = Ranks()


def ranks_of(fabric: Fabric) -> Ranks:
    """This process among those that Fabric has launched."""
    return Ranks(fabric.global_rank, fabric.world_size)
