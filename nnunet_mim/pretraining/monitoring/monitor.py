"""Is it working? What is measured every `val_every` iterations."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import printable
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import PretrainingNetwork
from nnunet_mim.pretraining.data.crops import CropDataset, UnreadCases
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.distributed.launch import say
from nnunet_mim.pretraining.monitoring.figures import Measurement
from nnunet_mim.pretraining.monitoring.held_out import HeldOut
from nnunet_mim.pretraining.monitoring.probe import LabelProbe, probe_cases


class Monitor:
    """Measurements on held-out cases. Every rank does all of them, so that none waits for another."""

    def __init__(self, data: RunData, config: PretrainConfig, fabric: Fabric, views_per_pass: int | None) -> None:
        self.fabric = fabric
        self.config = config
        crops, valid, datasets = _held_out_crops(data, config)
        fill, flat_threshold, width = (
            torch.tensor(values, device=fabric.device) for values in (data.fill, data.flat_threshold, data.width)
        )
        crops, valid = crops.to(fabric.device), valid.to(fabric.device)
        self.held_out = HeldOut(crops, valid, datasets, fill, flat_threshold, width, config, views_per_pass)
        for number in self.held_out.without_targets:
            say(f"warning: level {number} is not measured: no held-out crop has a token without padding or air in it")
        cases = probe_cases(data.train, data.val, config.probe_cases, config.seed) if config.probe_every else None
        self.probe = cases and LabelProbe(*cases, data.fill, seed=config.seed, device=fabric.device)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """duration of every measurement, by kind"""

    def measure(self, model: PretrainingNetwork, iteration: int) -> Measurement[float]:
        """Measure with HeldOut and, where it is due, LabelProbe."""
        with self.clock("held_out"), self.fabric.autocast():
            figures = replace(self.held_out.evaluate(model), iteration=iteration)
        if self.probe is not None and self.due(iteration):
            with self.clock("probe"), self.fabric.autocast():
                figures = replace(figures, probe=self.probe.evaluate(model.feature_source))
        return figures

    def due(self, iteration: int) -> bool:
        """Whether this measurement is the first one after a multiple of `probe_every`, or the last of the run: time for
        probe and report.
        """
        every = self.config.probe_every
        return bool(every) and (iteration % every < self.config.val_every or iteration == self.config.iterations)

    @contextmanager
    def clock(self, kind: str) -> Iterator[None]:
        """Add the time spent inside to `seconds`."""
        since = time.perf_counter()
        yield
        self.seconds[kind].append(time.perf_counter() - since)


def _held_out_crops(data: RunData, config: PretrainConfig) -> tuple[Tensor, Tensor, list[str]]:
    """`val_crops` fixed crops of the held-out cases, from one dataset after the other, at least one of each: crops and
    valid boxes as in `nested_views`, and the dataset of each.
    """
    groups = [data.val.of_dataset(int(number)) for number in np.flatnonzero(data.val.counts)]
    datasets = [
        CropDataset(cases, levels_of(config)[0].fov, body_fraction=1.0, seed=config.seed, stream=1) for cases in groups
    ]
    crops, valid, names = [], [], []
    for number in range(max(config.val_crops, len(groups))):
        which = number % len(groups)
        crop, box, missed = datasets[which][number // len(groups)]
        for name in UnreadCases(groups[which]).add(missed):
            print(f"{printable(name)} has changed or cannot be read any more: another held-out case takes its place")
        crops.append(crop)
        valid.append(box)
        names.append(groups[which][0].source.dataset)
    return torch.stack(crops), torch.stack(valid), names
