"""Is it working? What is measured every `val_every` iterations."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor

from nnunet_mim.config import PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.data import RunData
from nnunet_mim.pretraining.dataset import CropDataset
from nnunet_mim.pretraining.held_out import HeldOut
from nnunet_mim.pretraining.sharding import whole_weights


class Monitor:
    """Measurements on held-out cases. Every rank does all of them, so that none waits for another.

    Args:
        data: cases.
        config: of the run.
        fabric: device and precision.
        views_per_pass: most views computed at once; None: all views of a level of one crop.
        sharded: whether the model's weights are spread over ranks.
    """

    def __init__(
        self, data: RunData, config: PretrainConfig, fabric: Fabric, views_per_pass: int | None, sharded: bool = False
    ) -> None:
        self.fabric = fabric
        self.config = config
        crops, valid = held_out_crops(data, config, fabric.device)
        fill, flat_threshold, width = (
            torch.tensor(values, device=fabric.device) for values in (data.fill, data.flat_threshold, data.width)
        )
        self.held_out = HeldOut(crops, valid, fill, flat_threshold, width, levels_of(config), config, views_per_pass)
        self.whole: MaskInMask | None = None
        if sharded:
            self.whole = MaskInMask(config.network, config.in_channels, alignment=config.alignment).to(fabric.device)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """how long every measurement has taken, by kind"""

    def measure(self, model: MaskInMask, iteration: int) -> dict[str, float]:
        """Figures by name (`val/…`, `baseline/…`), see HeldOut. Eager: graphs without gradients are not worth it."""
        if self.whole is not None:
            self.whole.load_state_dict(whole_weights(model))
            model = self.whole
        with self.clock("held_out"), self.fabric.autocast():
            return {**self.held_out.evaluate(model), **self.held_out.constants}

    @contextmanager
    def clock(self, kind: str) -> Iterator[None]:
        """Add the time spent inside to `seconds`."""
        since = time.perf_counter()
        yield
        self.seconds[kind].append(time.perf_counter() - since)


def held_out_crops(data: RunData, config: PretrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fixed crops of the held-out cases: (val_crops, C, …) and their valid boxes."""
    dataset = CropDataset(data.val, levels_of(config)[0].fov, body_fraction=1.0, seed=config.seed, stream=1)
    crops, valid, _ = zip(*(dataset[i] for i in range(config.val_crops)), strict=True)
    return torch.stack(crops).to(device), torch.stack(valid).to(device)
