"""The pretraining loop, top to bottom."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_mim.checkpoint.format import BEST, FINAL, LATEST, load_checkpoint
from nnunet_mim.checkpoint.identity import merged_records
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.mask_in_mask import LevelOutput
from nnunet_mim.pretraining.data.crops import UnreadCases, case_records
from nnunet_mim.pretraining.data.loading import training_batches, training_crops
from nnunet_mim.pretraining.data.run_data import RunData
from nnunet_mim.pretraining.distributed.ranks import ranks_of
from nnunet_mim.pretraining.monitoring.figures import Measurement, TrainingFigures
from nnunet_mim.pretraining.monitoring.monitor import Monitor
from nnunet_mim.pretraining.monitoring.progress import culprits, mean_figures, progress_text
from nnunet_mim.pretraining.objective.losses import full
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.record import RunRecord
from nnunet_mim.pretraining.schedules import learning_rates
from nnunet_mim.pretraining.sharding import (
    load_optimizer_state,
    optimizer_state,
    shard,
    whole_weights,
)
from nnunet_mim.pretraining.step import RecordedStep, TrainStep, ordinary_step
from nnunet_mim.pretraining.stopping import SkippedSteps, StoppedError, StopRequests

LOG_EVERY = 10
SHOWN_EVERY_S = 10.0
"""between two states of the progress bar in a log file, where each of them stays"""
MOST_GRAPHS = 64
"""of torch.compile: levels, times first, whole and last passes, with and without a parent"""


@dataclass(frozen=True)
class RunOptions:
    """How a run is computed on a machine; none of this changes what is computed (but for rounding)."""

    workers: int = 0
    """processes that read crops; 0 reads in the main process"""
    views_per_pass: int | None = None
    """most views computed at once, which bounds the memory; None: all views of a level"""
    recompute: tuple[int, ...] = ()
    """levels (1 to 3) whose activations are computed again in the backward pass: less memory, more time"""
    compile: bool = False
    """torch.compile the network, one graph a level"""
    record: bool = True
    """on one GPU, record a step as a CUDA graph and replay it; not with `compile` or `recompute`"""
    strict: bool = False
    """end the run at a case that cannot be read any more, instead of drawing another one"""
    shard: bool = False
    """spread weights and optimiser state over the devices (FSDP) instead of keeping all of them on each"""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise MiMError(f"--workers must be 0 or more, got {self.workers}")
        if self.views_per_pass is not None and self.views_per_pass < 1:
            raise MiMError(f"--views_per_pass must be at least 1, got {self.views_per_pass}")
        if not set(self.recompute) <= {1, 2, 3}:
            raise MiMError(f"--recompute takes level numbers 1, 2, 3, got {self.recompute}")


@dataclass(frozen=True)
class RunResult:
    """Of a finished run."""

    figures: Measurement[float]
    """last measurement on held-out cases"""
    verdict: str
    """one sentence: is it working?"""
    seconds: float
    """from the first measurement on, in this process"""
    measuring: dict[str, list[float]]
    """of these, how long every measurement has taken, by kind"""

    @property
    def measuring_share(self) -> float:
        """Share of the time that measurements took."""
        return sum(sum(seconds) for seconds in self.measuring.values()) / self.seconds


def pretrain(
    config: PretrainConfig,
    data: RunData,
    folder: Path,
    fabric: Fabric,
    resume: bool,
    run: RunOptions,
    on_step: Callable[[int], None] | None = None,
) -> RunResult:
    """Train until `config.iterations`, writing checkpoints, `train.csv`, `val.csv` and TensorBoard events into
    `folder`.

    Every random number depends on (seed, iteration) alone, so a resumed run continues as if it had not stopped.

    Args:
        config: what to compute.
        data: cases.
        folder: output folder, exists.
        fabric: launched; devices and precision.
        resume: continue from `checkpoint_latest.pth`.
        run: how to compute it on this machine.
        on_step: called after every iteration with the number done.

    Raises:
        MiMError: too many steps had no finite gradient; the last checkpoint is kept.
        StoppedError: after a signal; the run has been saved.
    """
    levels, ranks = levels_of(config), ranks_of(fabric)
    torch.manual_seed(config.seed)
    model = build_network(config)
    stored: dict[str, Any] = {}
    if resume or config.init_checkpoint:
        stored = load_checkpoint(folder / LATEST if resume else Path(config.init_checkpoint))
        model.load_state_dict(stored["network_weights"])
    fabric.to_device(model)
    if run.shard:
        shard(model, ranks, fabric.device)
    optimizer = build_optimizer(model, config)
    start, history, skipped = 0, [], []
    seen, crops_seen = case_records(data.train), Counter({source.dataset: 0 for source in data.sources})
    if stored:
        seen = merged_records(stored["provenance"]["cases"], seen)
    if resume:
        load_optimizer_state(model, optimizer, stored["resume_state"]["optimizer"])
        start, history = stored["provenance"]["iterations"], stored["provenance"]["loss_history"]
        skipped = stored["provenance"]["skipped_steps"]
        crops_seen.update(stored["provenance"].get("crops_seen", {}))
    forward = forward_on(fabric, compiled(model) if run.compile else model)
    schedule = learning_rates(config.iterations, config.learning_rate, config.warmup_fraction)
    skips = SkippedSteps(skipped, config.max_skipped, config.skip_window)
    record = RunRecord(folder, config, data, seen, start, history, crops_seen, fabric.is_global_zero)
    unread = UnreadCases(data.train)

    fill, flat_threshold = (torch.tensor(v, device=fabric.device) for v in (data.fill, data.flat_threshold))
    place_threshold = flat_threshold if config.body_children else None
    train_step: TrainStep = ordinary_step(
        forward, model, optimizer, flat_threshold, config, ranks, run.views_per_pass, run.recompute, run.shard
    )
    alone = fabric.device.type == "cuda" and ranks.world == 1
    if run.record and alone and not (run.compile or run.recompute or run.shard):
        train_step = RecordedStep(train_step, optimizer)
    monitor = Monitor(data, config, fabric, run.views_per_pass, run.shard)
    dataset = training_crops(data, config)
    batches = training_batches(dataset, config, start, run.workers, fabric.device, ranks)

    def say(text: str) -> None:
        if fabric.is_global_zero:  # tqdm's own switch does not silence its `write`
            progress.write(text)

    def save(name: str, iteration: int, resumable: bool = False) -> None:
        state = {"optimizer": optimizer_state(model, optimizer)} if resumable else None
        record.save(name, iteration, whole_weights(model), skips.steps, state)

    began = time.perf_counter()
    if resume:
        val = Measurement.from_row(history[-1])
    else:
        val = monitor.measure(model, 0)
        record.measured(0, val)
    recent: list[TrainingFigures[Tensor]] = []  # figures of the steps since the last log, still on the device
    since = time.perf_counter()
    progress = tqdm(
        total=config.iterations, initial=start, desc="pretraining", unit="it", smoothing=0.05,
        disable=not fabric.is_global_zero, mininterval=0.1 if sys.stderr.isatty() else SHOWN_EVERY_S,
    )  # fmt: skip
    with StopRequests() as stop, progress, closing(batches):
        for iteration in range(start, config.iterations):
            for group in optimizer.param_groups:
                group["lr"] = float(schedule[iteration])
            crops, valid, missed = next(batches)
            for name in unread.add(missed):
                if run.strict:
                    raise MiMError(f"{name} cannot be read any more: restore it and continue with --c")
                progress.write(f"{name} cannot be read any more: other cases take its place")
            generator = torch.Generator(fabric.device).manual_seed(config.seed * 1_000_003 + 500_009 + iteration)
            views = nested_views(crops, valid, fill, levels, generator, place_threshold, ranks)

            figures = train_step(views)

            done = iteration + 1
            recent.append(figures)
            progress.update(1)
            if on_step is not None:
                on_step(done)
            last = done == config.iterations
            measure = done % config.val_every == 0 or last
            asked = (ranks.world == 1 or done % LOG_EVERY == 0) and ranks.any(bool(stop.received), fabric.device)
            due = (done % config.save_every == 0 or asked) and not last
            if done % LOG_EVERY == 0 or measure or due:
                means, bad = mean_figures(recent, ranks)
                for number in bad:
                    first = done - len(recent) + number
                    say(skips.add(first + 1, culprits(dataset, first, bad[number], config.batch_size)))
                speed = len(recent) * config.batch_size / (time.perf_counter() - since)
                crops_seen.update(
                    dataset.counts(range((done - len(recent)) * config.batch_size, done * config.batch_size))
                )
                counts = {name: float(n) for name, n in crops_seen.items()}
                failed = float(ranks.sum(torch.tensor(float(unread.failed), device=fabric.device)))
                rate = float(schedule[iteration])
                logged = replace(means, learning_rate=rate, crops_per_s=speed, unread=failed, crops=counts)
                record.log(done, logged)
                progress.set_postfix(progress_text(means, val, speed), refresh=False)
                recent.clear()
                skips.check(done, folder)
                since = time.perf_counter()
            if measure:
                val = monitor.measure(model, done)
                with monitor.clock("progress"):
                    best = record.measured(done, val, means)
                if best:
                    save(BEST, done)
                if monitor.due(done) or last:
                    with monitor.clock("report"):
                        record.report(done, whole_weights(model), skips.steps, fabric.device.type)
                    say(f"iteration {done}: {record.verdict()}")
                since = time.perf_counter()
            if due:
                save(LATEST, done, resumable=True)
            if asked and not last:
                fabric.barrier()
                raise StoppedError(f"stopped after {done} of {config.iterations} iterations: continue with --c")
        save(FINAL, config.iterations)
    record.close()
    return RunResult(val, record.verdict(), time.perf_counter() - began, dict(monitor.seconds))


def compiled(model: nn.Module) -> Any:
    """torch.compile of the network: a graph for every level, and for a last pass with fewer views."""
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    return torch.compile(model, dynamic=False)


def forward_on(fabric: Fabric, network: Callable[..., LevelOutput]) -> Callable[..., LevelOutput]:
    """The network in the precision of `fabric`; features, which are kept for the next level, in float32."""

    def forward(*inputs: Any) -> LevelOutput:
        with fabric.autocast():
            output = network(*inputs)
        return output._replace(features=full(output.features))

    return forward


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and other vectors."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        vector = parameter.ndim < 2 or name.endswith("mask_token")
        (no_decay if vector else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
