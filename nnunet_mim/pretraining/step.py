"""One optimiser step of pretraining and the learning rate of each: operation by operation, or as one CUDA graph.

A step is thousands of small operations, however many crops there are: starting them takes the host about 0.2 s, most of
which an H100 idles (benchmarks/results/2026-11-26_h100.md). Recorded once, they are started by a single call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.mask_in_mask import HasUNet, Reconstructs
from nnunet_mim.pretraining.distributed.ranks import ALONE, Ranks, ranks_of
from nnunet_mim.pretraining.half_precision import HalfPrecisionCopy
from nnunet_mim.pretraining.monitoring.figures import LevelFigures, TrainingFigures, mapped
from nnunet_mim.pretraining.objective.levels import (
    add_pass,
    level_losses,
    summed,
    unet_losses,
)
from nnunet_mim.pretraining.objective.views import LevelViews
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.state import TrainingState

PROBE_STEPS = 2
"""steps after which a GPU knows how many views fit: the optimiser makes its state in the first"""
PROBE_VIEWS = 8
"""views of a pass in them"""
MEMORY_SHARE = 0.8
"""share of the free memory of a GPU that the activations of a pass may take"""
WARM_UP = PROBE_STEPS + 1
"""ordinary steps before one is recorded: kernels are compiled and chosen in them"""

MAX_GRAPHS = 64
"""of torch.compile: one for all levels together, or for each level, full and last passes"""

T = TypeVar("T")
TrainStep = Callable[[list[LevelViews]], TrainingFigures[Tensor]]
"""Views of all levels → figures of the step, on the device: those of `level_losses` added up over passes, `grad_norm`,
and `skipped`, 1 where the gradient was not finite and the weights stayed as they were."""


def learning_rates(iterations: int, peak: float, warmup_fraction: float, begins: int = 0) -> np.ndarray:
    """Zero until iteration `begins`, linear warm-up to `peak`, then a half cosine to 0.

    Args:
        iterations: optimiser steps of the whole run.
        peak: absolute learning rate at the end of the warm-up.
        warmup_fraction: share of the steps from `begins` on spent in warm-up (at least one step).
        begins: first step that learns.

    Returns:
        (iterations,) float64; step `begins` already learns, the last one is above 0.
    """
    learning = iterations - begins
    warmup = max(1, round(learning * warmup_fraction))
    step = np.arange(learning)
    rising = peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, learning - warmup)
    rates = np.where(step < warmup, rising, peak * 0.5 * (1 + np.cos(np.pi * progress)))
    return np.concatenate([np.zeros(begins), rates])


def build_step(state: TrainingState, run: Run, fabric: Fabric, unet_learns: bool) -> TrainStep:
    """The step of a run: on GPUs recorded as a CUDA graph, unless options are against it.

    Args:
        unet_learns: whether the U-Net around the encoder, if the run has one, learns too.
    """
    options, ranks = run.options, ranks_of(fabric)
    config = run.config if unet_learns else replace(run.config, unet_weight=0.0)
    if options.compile:
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
    forward: Reconstructs
    if options.precision == "bf16-mixed":
        forward = HalfPrecisionCopy(state.model, options.compile)
    else:
        forward = torch.compile(state.model, dynamic=False) if options.compile else state.model  # type: ignore[assignment]
    flat_threshold = torch.tensor(run.data.flat_threshold, device=fabric.device)

    def in_passes_of(views: int | None) -> TrainStep:
        return ordinary_step(
            forward, state.model, state.optimizer, flat_threshold, config, ranks, views, options.recompute
        )

    measured = fabric.device.type == "cuda" and options.views_per_pass is None
    step = SizedStep(in_passes_of, fabric.device, ranks) if measured else in_passes_of(options.views_per_pass)
    if options.record and fabric.device.type == "cuda" and not (options.compile or options.recompute):
        return RecordedStep(step, state.optimizer)
    return step


def ordinary_step(
    forward: Reconstructs, model: nn.Module, optimizer: torch.optim.Optimizer, flat_threshold: Tensor,
    config: PretrainConfig, ranks: Ranks, views_per_pass: int | None = None, recompute: tuple[int, ...] = (),
) -> TrainStep:  # fmt: skip
    """Forward and backward, pass by pass, clipping, the optimiser.

    Args:
        forward: `model`, or a copy of it in half precision.
        model, optimizer: what learns.
        flat_threshold, config, ranks, views_per_pass, recompute: as in `level_losses` and RunOptions.

    Levels whose loss has no weight, nor any level below, are not computed; nor is a U-Net without a weight, whose
    figures are NaN then.
    """

    def step(views: list[LevelViews]) -> TrainingFigures[Tensor]:
        levels: list[LevelFigures[Tensor]] = []
        if isinstance(forward, HalfPrecisionCopy):
            forward.take_weights()
        n_computed = config.levels_that_count(len(views))
        passes = level_losses(forward, views, flat_threshold, config, views_per_pass, recompute, ranks, n_computed)
        for parts in _learn(forward, passes):
            for part in parts:
                add_pass(levels, part.figures)
        if config.decoder == "unet":
            by_level = {n: flat_threshold.new_full((), torch.nan) for n in config.unet_levels(len(views))}
            if config.unet_weight > 0:
                unet: HasUNet = forward  # type: ignore[assignment]
                passes_of_unet = unet_losses(unet, views, flat_threshold, config, views_per_pass, ranks)
                by_level = summed(_learn(forward, passes_of_unet))
            levels = [replace(level, unet=by_level.get(level.number)) for level in levels]
        ranks.sum_all([p.grad for p in model.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).detach()
        skipped = (~torch.isfinite(norm)).float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # the step does nothing where it is 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return TrainingFigures(levels=tuple(levels), grad_norm=norm, skipped=skipped)

    return step


def _learn(forward: Reconstructs, passes: Iterable[tuple[Tensor, T]]) -> Iterator[T]:
    """Back-propagate pass by pass, so that activations are those of one at a time; yields what comes with each loss."""
    for loss, found in passes:
        loss.backward()
        if isinstance(forward, HalfPrecisionCopy):
            forward.give_gradients()
        yield found


class SizedStep:
    """The same step, in passes as large as the memory of a GPU allows.

    The first PROBE_STEPS calls compute PROBE_VIEWS views at a time, and the last of them measures the memory of a view.
    From then on all views of all levels are one pass if they fit on every rank, else as many of a level as fit on all.
    Ranks take the same number: the messages between them come in the order of the passes.

    Args:
        in_passes_of: views per pass → the step; None: all views of all levels.
        device: the GPU.
        ranks: this process among those of the run.

    Raises torch.OutOfMemoryError, whose `views_per_pass` are the views of a pass that did not fit.
    """

    def __init__(
        self, in_passes_of: Callable[[int | None], TrainStep], device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self.in_passes_of, self.device, self.ranks = in_passes_of, device, ranks
        self.step = in_passes_of(PROBE_VIEWS)
        self.views_per_pass = PROBE_VIEWS
        self.done = 0

    def __call__(self, views: list[LevelViews]) -> TrainingFigures[Tensor]:
        self.done += 1
        try:
            return self._measured(views) if self.done == PROBE_STEPS else self.step(views)
        except torch.OutOfMemoryError as error:
            error.views_per_pass = min(self.views_per_pass, sum(len(level.images) for level in views))  # type: ignore[attr-defined]
            raise

    def _measured(self, views: list[LevelViews]) -> TrainingFigures[Tensor]:
        """The last step of PROBE_VIEWS, and the size of the passes of all later ones."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        figures = self.step(views)
        used = torch.cuda.max_memory_allocated(self.device) - before
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = MEMORY_SHARE * (torch.cuda.mem_get_info(self.device)[0] + unused)
        n_views = [len(level.images) for level in views]
        fitting = self.ranks.least(int(free / max(1.0, used / min(PROBE_VIEWS, max(n_views)))), self.device)
        self.views_per_pass = max(1, fitting)
        self.step = self.in_passes_of(None if fitting >= sum(n_views) else max(1, fitting))
        return figures


class DeviceMemoryError(MiMError):
    """The memory of the device does not hold a run."""


@contextmanager
def full_memory_named(run: Run) -> Iterator[None]:
    """Turn a device's error of being out of memory into a DeviceMemoryError that says which options need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        options, batch = run.options, run.config.batch_size
        views = getattr(error, "views_per_pass", options.views_per_pass or PROBE_VIEWS)
        remedies = ["--recompute 1 2 3"] if set(options.recompute) != {1, 2, 3} else []
        if views > 1:
            remedies.append(f"--views_per_pass {views // 2}")
        if batch > 1:
            remedies.append(f"--batch {batch // 2}")
        remedy = f"add {' or '.join(remedies)}" if remedies else "choose a smaller --view or --preset"
        raise DeviceMemoryError(f"the memory of the GPU does not hold a step of {batch} crops: {remedy}") from error


class RecordedStep:
    """The same step as a CUDA graph: the first WARM_UP calls are ordinary ones, the next records, all others replay.

    Memory of a step stays reserved from then on. The optimiser must be a fused one: its state is on the device. What
    ranks tell each other is recorded too (NCCL); each rank records its own graph, and its order of messages is theirs.
    """

    def __init__(self, step: TrainStep, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.optimizer = step, optimizer
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.inputs: list[Tensor] = []
        self.rates: list[Tensor] = []
        self.figures: TrainingFigures[Tensor] = TrainingFigures()

    def __call__(self, views: list[LevelViews]) -> TrainingFigures[Tensor]:
        """Do one step, with the learning rates that the optimiser's groups have now.

        Returns:
            the figures, the caller's own.

        Raises:
            MiMError: the step cannot be recorded.
            torch.OutOfMemoryError: the memory of the device is full.
            ValueError: the views have other shapes than those that were recorded.
        """
        if self.done < WARM_UP:
            self.done += 1
            return self._warm_up(views)
        new = _tensors(views)
        if self.graph is None:
            self.graph = self._record(views)
            self.inputs = new
        else:
            kinds = [[(t.shape, t.dtype) for t in tensors] for tensors in (new, self.inputs)]
            if kinds[0] != kinds[1]:
                raise ValueError("views of other shapes than those that were recorded")
            torch._foreach_copy_(self.inputs, new)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        levels = tuple(mapped(torch.clone, level) for level in self.figures.levels)
        return replace(mapped(torch.clone, self.figures), levels=levels)

    def _warm_up(self, views: list[LevelViews]) -> TrainingFigures[Tensor]:
        """On a stream of its own, as CUDA wants it before it records."""
        self.stream = self.stream or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            figures = self.step(views)
        current.wait_stream(self.stream)
        return figures

    def _record(self, views: list[LevelViews]) -> torch.cuda.CUDAGraph:
        """Record a step on these views, whose tensors are the graph's inputs from then on; nothing is computed yet."""
        groups = self.optimizer.param_groups
        self.rates = [torch.zeros((), device=views[0].images.device) for _ in groups]
        kept = [{key: group.get(key) for key in ("lr", "capturable")} for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group |= {"lr": rate, "capturable": True}
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the threads that pin batches and that watch messages between ranks go on meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.figures = self.step(views)
        except RuntimeError as error:
            cause = _first_cause(error)  # PyTorch says only that something has failed before
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = f"{type(cause).__name__}: {cause}".strip().split("\n")[0]
            raise MiMError(f"a step could not be recorded as a CUDA graph ({reason}): add --no-record") from error
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)  # the loop sets a plain rate, which `__call__` reads
        return graph


def _first_cause(error: BaseException) -> BaseException:
    """The error that began the chain of errors which ended in this one."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _tensors(views: list[LevelViews]) -> list[Tensor]:
    values = [getattr(view, field.name) for view in views for field in fields(view)]
    return [value for value in values if torch.is_tensor(value)]
