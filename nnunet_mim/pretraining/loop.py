"""The pretraining loop, top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from lightning_fabric import Fabric

from nnunet_mim.checkpoint.locate import FINAL, LATEST
from nnunet_mim.geometry import levels_of
from nnunet_mim.pretraining.data.loading import training_batches, training_crops
from nnunet_mim.pretraining.distributed.ranks import ranks_of
from nnunet_mim.pretraining.monitoring.figures import TrainingFigures
from nnunet_mim.pretraining.monitoring.monitor import Monitor
from nnunet_mim.pretraining.monitoring.progress import StepLog
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.record import RunRecord
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.state import initial_state
from nnunet_mim.pretraining.step import TrainStep, build_step, learning_rates
from nnunet_mim.pretraining.stopping import StoppedError, StopRequests
from nnunet_mim.system.processes import killed_readers_named

LOG_EVERY = 10
"""iterations between two rows of train.csv"""


def pretrain(run: Run, fabric: Fabric, on_step: Callable[[int], None] | None = None) -> RunRecord:
    """Train until `config.iterations`, writing checkpoints, `train.csv`, `val.csv` and TensorBoard events.

    Every random number depends on (seed, iteration) alone, so a resumed run continues as if it had not stopped.

    Args:
        run: what to compute, on which cases, where to write; its folder exists.
        fabric: launched; devices and precision.
        on_step: called after every iteration with the number done.

    Returns:
        what the run has recorded.

    Raises:
        MiMError: too many steps had no finite gradient; the last checkpoint is kept.
        StoppedError: after a signal; the run has been saved.
    """
    config, ranks, device = run.config, ranks_of(fabric), fabric.device
    state = initial_state(run, fabric)
    steps: dict[bool, TrainStep] = {}
    """by whether the U-Net around the encoder learns"""
    monitor = Monitor(run.data, config, fabric, run.options.views_per_pass)
    dataset = training_crops(run.data, config)
    batches = training_batches(dataset, config, state.iteration, run.options, device, ranks)
    schedule = config.iterations, config.learning_rate, config.warmup_fraction
    rates, rates_of_unet = learning_rates(*schedule), learning_rates(*schedule, config.unet_begins)
    levels = levels_of(config)
    fill, flat_threshold = (torch.tensor(v, device=device) for v in (run.data.fill, run.data.flat_threshold))
    place_threshold = flat_threshold if config.body_children else None
    record = RunRecord(run, state, monitor, fabric)
    log = StepLog(run, state, record, dataset, ranks, device)

    if state.iteration == 0:
        record.measure(TrainingFigures())
    with StopRequests() as stop, log.bar, closing(batches), killed_readers_named():
        while state.iteration < config.iterations:
            crops, valid, unread = next(batches)
            log.note_unread(unread)
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + 500_009 + state.iteration)
            views = nested_views(crops, valid, fill, levels, generator, place_threshold, ranks)
            for group in state.optimizer.param_groups:
                group["lr"] = float((rates_of_unet if group.get("unet") else rates)[state.iteration])

            unet_learns = config.unet_learns(state.iteration)
            if unet_learns not in steps:
                steps[unet_learns] = build_step(state, run, fabric, unet_learns)
            log.add(steps[unet_learns](views))

            state.iteration += 1
            if on_step is not None:
                on_step(state.iteration)
            last = state.iteration == config.iterations
            measure = last or state.iteration % config.val_every == 0
            log_now = state.iteration % LOG_EVERY == 0
            asked = (log_now or ranks.world == 1) and ranks.any(bool(stop.received), device)  # a message: not each time
            save = not last and (asked or state.iteration % config.save_every == 0)
            if log_now or measure or save:
                log.write_row(rate=float(rates[state.iteration - 1]))
            if measure:
                log.say(record.measure(log.means))
                log.restart_clock()
            if save:
                record.save(LATEST, resumable=True)
            if asked and not last:
                fabric.barrier()
                raise StoppedError(
                    f"stopped after {state.iteration} of {config.iterations} iterations: continue with --c"
                )
        record.save(FINAL)
    record.close()
    return record
