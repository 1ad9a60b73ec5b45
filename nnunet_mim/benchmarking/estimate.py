"""How long a training would take: a few steps of its network, and the patches of its validation."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.benchmarking.cell import Cell

STEPS = 3


def measure(cell: Cell, dataset_json: dict[str, Any], device: str) -> float:
    """Seconds of a training with its validation, from the median of three steps on made-up patches. Reading and
    augmenting patches, which runs at the same time, is not included.
    """
    source, length = cell.arm.source, cell.length
    manager = PlansManager(dict(source.plans))
    configuration = manager.get_configuration(source.configuration)
    network = get_network_from_plans(
        configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import, source.in_channels,
        manager.get_label_manager(dataset_json).num_segmentation_heads, deep_supervision=True,
    ).to(device)  # fmt: skip
    patch = tuple(configuration.patch_size)
    training = median_seconds(network, (configuration.batch_size, source.in_channels, *patch), device, True)
    network.eval()
    forward = median_seconds(network, (1, source.in_channels, *patch), device, False)
    steps = length.epochs * (length.iterations * training + length.val_iterations * forward * configuration.batch_size)
    shape = [max(a, round(b)) for a, b in zip(patch, configuration.median_image_size_in_voxels, strict=True)]
    patches = math.prod(len(positions) for positions in compute_steps_for_sliding_window(shape, patch, 0.5))
    return steps + len(cell.val_cases) * patches * views(cell) * forward


def views(cell: Cell) -> int:
    """Number of mirrored predictions of a patch."""
    if not cell.arm.spec.is_mim:
        return 2**3
    axes = cell.recipe().mirror_axes
    return 2 ** (2 if axes is None else len(axes))


def median_seconds(network: torch.nn.Module, shape: Iterable[int], device: str, train: bool) -> float:
    """Median seconds of a forward pass, or of a forward and a backward pass, after one that does not count."""
    patch = torch.randn(*shape, device=device)
    precision = torch.autocast("cuda") if device == "cuda" else nullcontext()
    seconds = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        with torch.set_grad_enabled(train), precision:
            outputs = network(patch)
            if train:
                outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
                sum(output.float().square().mean() for output in outputs).backward()
                network.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
