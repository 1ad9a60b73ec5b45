"""The pretraining loop, top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from nnunet_mim.checkpoint.format import FINAL, LATEST
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.pretraining.data.crops import CropDataset, UnreadCases
from nnunet_mim.pretraining.data.loading import training_batches, training_crops
from nnunet_mim.pretraining.distributed.ranks import Ranks, ranks_of
from nnunet_mim.pretraining.monitoring.monitor import Monitor
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.record import RunRecord
from nnunet_mim.pretraining.setup import Run
from nnunet_mim.pretraining.state import TrainingState, initial_state
from nnunet_mim.pretraining.step import build_step, learning_rates
from nnunet_mim.pretraining.stopping import StoppedError, StopRequests

LOG_EVERY = 10
SHOWN_EVERY_S = 10.0
"""between two states of the progress bar in a log file, where each of them stays"""


@dataclass(frozen=True)
class RunResult:
    """What a finished run has reached and what it took."""

    figures: dict[str, float]
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


def pretrain(run: Run, fabric: Fabric, on_step: Callable[[int], None] | None = None) -> RunResult:
    """Train until `config.iterations`, writing checkpoints, `train.csv`, `val.csv` and TensorBoard events.

    Every random number depends on (seed, iteration) alone, so a resumed run continues as if it had not stopped.

    Args:
        run: what to compute, on which cases, where to write; its folder exists.
        fabric: launched; devices and precision.
        on_step: called after every iteration with the number done.

    Raises:
        MiMError: too many steps had no finite gradient; the last checkpoint is kept.
        StoppedError: after a signal; the run has been saved.
    """
    config, ranks, device = run.config, ranks_of(fabric), fabric.device
    state = initial_state(run, fabric)
    train_step = build_step(state, run, fabric)
    monitor = Monitor(run.data, config, fabric, run.options.views_per_pass)
    dataset = training_crops(run.data, config)
    batches = training_batches(dataset, config, state.iteration, run.options.workers or 0, device, ranks)
    rates = learning_rates(config.iterations, config.learning_rate, config.warmup_fraction)
    levels = levels_of(config)
    fill, flat_threshold = (torch.tensor(v, device=device) for v in (run.data.fill, run.data.flat_threshold))
    place_threshold = flat_threshold if config.body_children else None
    record = RunRecord(run, state, monitor, fabric)
    log = StepLog(run, state, record, dataset, ranks, device)

    began = time.perf_counter()
    if state.iteration == 0:
        record.measure({})
    with StopRequests() as stop, log.bar, closing(batches):
        while state.iteration < config.iterations:
            crops, valid, unread = next(batches)
            log.note_unread(unread)
            generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + 500_009 + state.iteration)
            views = nested_views(crops, valid, fill, levels, generator, place_threshold, ranks)
            for group in state.optimizer.param_groups:
                group["lr"] = float(rates[state.iteration])

            log.add(train_step(views))

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
    return RunResult(record.val, record.verdict(), time.perf_counter() - began, dict(monitor.seconds))


class StepLog:
    """The progress bar, and the rows of train.csv: each holds the steps since the one before.

    Args:
        run: what is computed.
        state: of the run; skipped steps and drawn crops are counted in it.
        record: that rows are written to.
        dataset: crops of the run by number.
        ranks: processes.
        device: of this process.
    """

    def __init__(
        self, run: Run, state: TrainingState, record: RunRecord, dataset: CropDataset, ranks: Ranks,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.run, self.state, self.record, self.dataset, self.ranks = run, state, record, dataset, ranks
        self.device = device
        self.steps: list[dict[str, Tensor]] = []
        """figures of the steps since the last row, still on the device"""
        self.means: dict[str, float] = {}
        """of the last row"""
        self.unread = UnreadCases(run.data.train)
        self.bar = tqdm(
            total=run.config.iterations, initial=state.iteration, desc="pretraining", unit="it", smoothing=0.05,
            disable=not record.active, mininterval=0.1 if sys.stderr.isatty() else SHOWN_EVERY_S,
        )  # fmt: skip
        self.restart_clock()

    def note_unread(self, numbers: Tensor) -> None:
        """Name the cases of a batch that cannot be read any more, (B, TRIES), see CropDataset.

        Raises:
            MiMError: there is one, and the run is strict.
        """
        for name in self.unread.add(numbers):
            if self.run.strict:
                raise MiMError(f"{name} cannot be read any more: restore it and continue with --c")
            self.bar.write(f"{name} cannot be read any more: other cases take its place")

    def add(self, figures: dict[str, Tensor]) -> None:
        """Keep the figures of one step."""
        self.steps.append(figures)
        self.bar.update(1)

    def write_row(self, rate: float) -> None:
        """Write the mean figures of the steps since the last row, and name those that were skipped.

        Args:
            rate: learning rate of the last step.

        Raises:
            MiMError: too many steps were skipped.
        """
        state, batch_size = self.state, self.run.config.batch_size
        done, first = state.iteration, state.iteration - len(self.steps)
        self.means, bad = mean_figures(self.steps, self.ranks)
        for number in bad:
            names = culprits(self.dataset, first + number, bad[number], batch_size)
            self.say(state.skipped.add(first + number + 1, names))
        speed = len(self.steps) * batch_size / (time.perf_counter() - self.since)
        state.crops_seen.update(self.dataset.counts(range(first * batch_size, done * batch_size)))
        failed = float(self.ranks.sum(torch.tensor(float(self.unread.failed), device=self.device)))
        counts = {f"train/crops/{name}": float(n) for name, n in state.crops_seen.items()}
        row = {**self.means, "lr": rate, "crops_per_s": speed, "train/unread": failed, **counts}
        self.record.log("train", done, row)
        self.bar.set_postfix(progress_text(self.means, self.record.val, speed), refresh=False)
        self.steps.clear()
        state.skipped.check(done, self.run.folder)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Let the speed be that from now on."""
        self.since = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line above the bar, on the first rank only."""
        if text and self.record.active:  # tqdm's own switch does not silence its `write`
            self.bar.write(text)


def mean_figures(steps: list[dict[str, Tensor]], ranks: Ranks) -> tuple[dict[str, float], dict[int, list[bool]]]:
    """Mean over steps and ranks, read from the device in one go, plus the sum of the levels as `train/loss`.

    Reconstruction losses are weighted by their number of target tokens, as in HeldOut. Skipped steps count in
    `train/skipped` alone, which is their number; where all were skipped, the other means are NaN.

    Returns:
        means by name; and for each skipped step its number in `steps` and whether each crop of its batch had features
        that were not finite.
    """
    names = [name for name in steps[0] if name != "nonfinite"]
    local = torch.stack([torch.stack([step[name].float() for name in names]) for step in steps])
    same_everywhere = torch.tensor([name in ("grad_norm", "skipped") for name in names], device=local.device)
    values = ranks.sum(torch.where(same_everywhere, local / ranks.world, local)).cpu()
    columns = {name: values[:, i] for i, name in enumerate(names)}
    used = columns["skipped"] == 0
    means = {}
    for name, column in columns.items():
        level, _, kind = name.partition("/")
        weight = columns[f"{level}/targets"][used] if kind == "reconstruction" else torch.ones(int(used.sum()))
        mean = (column[used] * weight).sum() / weight.sum().clamp(min=1) if used.any() else math.nan
        means[f"train/{name}"] = float(mean)
    means["train/skipped"] = float((~used).sum())
    means["train/loss"] = sum(value for name, value in means.items() if name.endswith("/loss"))
    crops = ranks.gather(torch.stack([step["nonfinite"] for step in steps]).T.contiguous()).T.cpu()  # (steps, batch)
    return means, {i: (crops[i] > 0).tolist() for i in (~used).nonzero().flatten().tolist()}


def culprits(dataset: CropDataset, iteration: int, bad: list[bool], batch_size: int) -> list[str]:
    """Names of the cases of a skipped step: those whose features were not finite, or all if none or all were."""
    numbers = range(iteration * batch_size, (iteration + 1) * batch_size)
    chosen = [number for number, is_bad in zip(numbers, bad, strict=True) if is_bad] or numbers
    cases = [dataset.case_of(number) for number in chosen]
    return [
        f"{case.source.dataset} {case.info.case}, crop {number}" for case, number in zip(cases, chosen, strict=True)
    ]


def progress_text(train: dict[str, float], val: dict[str, float], speed: float) -> dict[str, str]:
    """What the progress bar shows beside speed and time left."""
    levels = [name.split("/")[1] for name in val if name.endswith("/reconstruction")]
    trained = [level for level in levels if f"train/{level}/reconstruction" in train]
    text = {f"L{level[-1]}": f"{train[f'train/{level}/reconstruction']:.3f}" for level in trained}
    text["val"] = "/".join(f"{val[f'val/{level}/reconstruction']:.3f}" for level in levels)
    text["crops/s"] = f"{speed:.2f}"
    return text
