"""Trains a network per fold: an encoder with attention pooling, from pretrained or from random weights.

The validation cases of a fold are touched once, when training is over. The epoch and the temperature are chosen on an
inner split: a fifth of the training patients, on which no gradient is computed. Heads start as logistic regressions on
what they see before the first step (linear probing, then finetuning: arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from nnunet_mim.checkpoint.locate import LATEST
from nnunet_mim.classification.case_network import CaseNetwork, new_classifier
from nnunet_mim.classification.encoders import LoadedEncoder, with_mask_channel
from nnunet_mim.classification.folds import grouped_split, joint_classes
from nnunet_mim.classification.job import Job
from nnunet_mim.classification.labels import Target
from nnunet_mim.classification.options import LARGEST_WINDOW
from nnunet_mim.classification.probe import INNER_FOLDS, cross_entropy, fit_probe, fit_temperature
from nnunet_mim.classification.regions import CaseVoxels, whole_tokens
from nnunet_mim.classification.results import NETWORK, PREDICTIONS, TRAINING, save_weights, write_json
from nnunet_mim.classification.train import add_covariates, write_predictions
from nnunet_mim.classification.training_crops import Augmentation, Batch, TrainingCrops, training_batches
from nnunet_mim.classification.training_state import TrainingState
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.distributed.launch import say
from nnunet_mim.pretraining.distributed.ranks import Ranks, ranks_of
from nnunet_mim.pretraining.stopping import StoppedError, StopRequests
from nnunet_mim.system.progress import ProgressBar
from nnunet_mim.trainers.finetune_config import FinetuneConfig, default_mirror_axes
from nnunet_mim.trainers.optim import build_optimizer

WINDOW_SHARE = 0.9
"""of the boxes that a window holds, where none is given"""


@dataclass(frozen=True)
class InnerSplit:
    """Rows of the table in a fold's training part."""

    train: np.ndarray
    """ascending"""
    held_out: np.ndarray
    """of other patients: they choose the epoch and the temperature"""


@dataclass(frozen=True)
class FoldRun:
    """What a fold's training needs."""

    job: Job
    """its window is settled"""
    fold: int
    encoder: LoadedEncoder
    split: InnerSplit
    recipe: FinetuneConfig
    log_weights: dict[str, np.ndarray]
    """by target, (K,) log of how often a class counts more in training than in the cases"""

    @property
    def total(self) -> int:
        """Number of steps."""
        return self.recipe.num_epochs * self.recipe.iterations_per_epoch

    def identity(self) -> dict[str, Any]:
        """What has to be the same when a training goes on."""
        job, targets = self.job, self.job.table.targets
        rows = {"training cases": self.split.train, "inner cases": self.split.held_out}
        return {
            **job.config.to_dict(),
            "encoder": self.encoder.sha256,
            **{name: [job.table.cases[row] for row in part] for name, part in rows.items()},
            "labels": {target.name: target.labels[self.split.train].tolist() for target in targets},
        }


def with_settled_window(job: Job, cell: Sequence[int]) -> Job:
    """The job with a window of whole cells: the given one, or one that holds WINDOW_SHARE of the boxes on each axis."""
    window: Sequence[int] = job.config.window
    if not window:
        cases = ProgressBar(job.table.cases, desc="boxes", unit="case")
        boxes = [job.reader.read(case).box(job.config.margin) for case in cases]
        extents = np.quantile([high - low for low, high in boxes], WINDOW_SHARE, axis=0, method="higher")
        window = [min(-(-int(n) // c) * c, m) for n, c, m in zip(extents, cell, LARGEST_WINDOW, strict=True)]
    X, Y, Z = cell
    return replace(job, config=replace(job.config, window=whole_tokens(window, (X, Y, Z))))


def inner_split(job: Job, fold: int) -> InnerSplit:
    """Split the training cases of a fold, patients kept together and classes spread evenly."""
    rows = np.array(job.folds.training[fold])
    patients = [job.table.patients[row] for row in rows]
    labels = joint_classes([target.labels[rows] for target in job.table.targets])
    train, held_out = grouped_split(labels, patients, min(INNER_FOLDS, len(set(patients))), job.config.seed)[0]
    return InnerSplit(rows[train], rows[held_out])


def class_weights(target: Target, rows: np.ndarray) -> np.ndarray:
    """(K,) weights with which all classes that are there count alike, 1 in the mean over cases."""
    counts = np.bincount(target.labels[rows][target.known[rows]], minlength=len(target.classes))
    return counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))


def sampling_chances(targets: Sequence[Target], rows: np.ndarray) -> np.ndarray:
    """(N,) chances of cases with which the classes of each target are drawn alike, as far as all of them allow it."""
    weights = [np.where(t.known[rows], class_weights(t, rows)[t.labels[rows]], np.nan) for t in targets]
    return np.nanmean(weights, axis=0)


def prepare_fold(job: Job, fold: int) -> FoldRun:
    """Load the encoder, split the training cases, and settle window and recipe. Raises MiMError."""
    encoder = job.encoder(fold)
    if job.config.mask_channel:
        encoder = with_mask_channel(encoder)
    job = with_settled_window(job, encoder.cell)
    config, split = job.config, inner_split(job, fold)
    recipe = FinetuneConfig(
        num_epochs=config.epochs, iterations_per_epoch=ceil(len(split.train) / config.batch), lr=config.lr,
        layer_decay=config.layer_decay, mirror_axes=FinetuneConfig.from_plans(job.source.plans).mirror_axes,
    )  # fmt: skip
    log_weights = {}
    for target in job.table.targets:
        weights = np.ones(len(target.classes))
        if config.balance == "weights":
            weights = class_weights(target, split.train)
        elif config.balance == "sampling":
            known = split.train[target.known[split.train]]
            chances = sampling_chances(job.table.targets, split.train)[target.known[split.train]]
            drawn = np.bincount(target.labels[known], chances / chances.sum(), len(target.classes))
            there = np.bincount(target.labels[known], minlength=len(target.classes)) / len(known)
            weights = np.where(there > 0, drawn / np.where(there > 0, there, 1), 1.0)
        log_weights[target.name] = np.log(weights)
    return FoldRun(job, fold, encoder, split, recipe, log_weights)


def train_fold(run: FoldRun, fabric: Fabric, workers: int, resume: bool,
               on_step: Callable[[int], None] | None = None) -> None:  # fmt: skip
    """Train a fold, and write the network with its predictions of the validation cases.

    Args:
        run: of this fold.
        fabric: launched; devices and precision.
        workers: processes that read crops, for each device.
        resume: go on from the checkpoint, if there is one.
        on_step: called after every step with the number done.

    Raises:
        MiMError: a checkpoint does not fit.
        StoppedError: after a signal; the state has been saved.
    """
    job, config = run.job, run.job.config
    folder, ranks = job.fold_folder(config.arm, run.fold), ranks_of(fabric)
    folder.mkdir(parents=True, exist_ok=True)
    network = _network(run, fabric.device)
    state, advance = _initial_state(network, run)
    latest = folder / LATEST
    if resume and latest.is_file():
        state.restore(latest, run.identity())
    else:
        start_from_probe(network, run, ranks)
        _measure(state, network, run, ranks)
    advance(state.iteration)
    per_epoch = run.recipe.iterations_per_epoch
    batches = training_batches(_crops(run), state.iteration, run.total, workers, fabric.device, ranks)
    quiet = None if fabric.is_global_zero else True
    bar = ProgressBar(total=run.total, initial=state.iteration, desc=f"fold {run.fold}", unit="it", disable=quiet)
    with StopRequests() as stop, bar, closing(batches):
        while state.iteration < run.total:
            advance(state.iteration)
            _step(state, next(batches), run, fabric, ranks)
            state.iteration += 1
            bar.update()
            if on_step is not None:
                on_step(state.iteration)
            epoch_ends = state.iteration % per_epoch == 0
            if epoch_ends:
                _measure(state, network, run, ranks)
            asked = ranks.any(bool(stop.received), fabric.device) and state.iteration < run.total
            if (epoch_ends or asked) and fabric.is_global_zero:
                state.save(latest, run.identity())
            if asked:
                fabric.barrier()
                raise StoppedError(
                    f"stopped in fold {run.fold} after {state.iteration} of {run.total} steps: continue with --c"
                )
    _finish(state, network, run, ranks)
    fabric.barrier()


def _network(run: FoldRun, device: torch.device) -> CaseNetwork:
    job = run.job
    classes = {target.name: target.classes for target in job.table.targets}
    model = new_classifier(run.encoder.copy(), classes).to(device)
    return CaseNetwork(model, job.config, run.encoder.cell, device)


def _initial_state(network: CaseNetwork, run: FoldRun) -> tuple[TrainingState, Callable[[int], None]]:
    """A state before the first step, and a function that sets the learning rates of a step."""
    optimizer, schedule = build_optimizer(network.model, run.recipe)

    def advance(iteration: int) -> None:
        schedule.iteration = iteration
        schedule.advance()

    return TrainingState(network.model, optimizer), advance


def _crops(run: FoldRun) -> TrainingCrops:
    job, config, rows = run.job, run.job.config, run.split.train
    axes = run.recipe.mirror_axes
    if axes is None:
        axes = default_mirror_axes(job.source.plans.get("transpose_forward", (0, 1, 2)))
    targets = job.table.targets
    chances = sampling_chances(targets, rows) if config.balance == "sampling" else None
    labels = np.stack([target.labels[rows] for target in targets], axis=1)
    X, Y, Z = config.window
    names = [job.table.cases[row] for row in rows]
    return TrainingCrops(job.reader, names, labels, chances, config, run.encoder.cell, Augmentation((X, Y, Z), axes))


def _step(state: TrainingState, batch: Batch, run: FoldRun, fabric: Fabric, ranks: Ranks) -> None:
    """Forward, backward, sum over ranks, clip, optimiser; a step without a finite gradient changes nothing."""
    config = run.job.config
    weights = run.log_weights if config.balance == "weights" else {}
    state.model.train()
    with fabric.autocast():
        logits = state.model(batch.images, batch.places, batch.n_windows)
    loss = batch_loss(logits, batch.labels, weights, config.batch)
    loss.backward()
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    ranks.sum_all([p.grad for p in parameters if p.grad is not None])
    norm = nn.utils.clip_grad_norm_(parameters, run.recipe.grad_clip)
    if torch.isfinite(norm):
        state.optimizer.step()
    else:
        state.skipped += 1
    state.optimizer.zero_grad(set_to_none=True)
    state.losses.append(float(ranks.sum(loss.detach())))


def batch_loss(
    logits: Mapping[str, Tensor], labels: Tensor, log_weights: Mapping[str, np.ndarray], batch_size: int
) -> Tensor:
    """Mean over targets of the cross-entropy; of two classes it is the binary one of their logits' difference.

    Args:
        logits: (N, K) by target.
        labels: (N, targets); -1: does not count.
        log_weights: (K,) by target, log of the weights of classes; all alike where there are none.
        batch_size: what the sum is divided by: the cases of all ranks, so that gradients of ranks add up.
    """
    total = torch.zeros((), device=labels.device)
    for number, (target, values) in enumerate(logits.items()):
        weight = None
        if target in log_weights:
            weight = torch.as_tensor(np.exp(log_weights[target]), dtype=torch.float32, device=labels.device)
        total = total + F.cross_entropy(
            values.float(), labels[:, number], weight, ignore_index=-1, reduction="sum"
        )
    return total / (batch_size * len(logits))


def start_from_probe(network: CaseNetwork, run: FoldRun, ranks: Ranks) -> None:
    """Set the heads to logistic regressions on the features of the training cases, without augmentation."""
    job, rows = run.job, run.split.train
    features = _of_cases(network.features, run, rows, network.device, ranks)
    for target, module in zip(job.table.targets, network.model.heads, strict=True):
        known = target.known[rows]
        patients = [job.table.patients[row] for row in rows[known]]
        labels, n_classes = target.labels[rows[known]], len(target.classes)
        probe = fit_probe(features[target.name][known], labels, patients, n_classes, job.config.seed).probe
        values = {
            "mean": probe.mean, "scale": probe.scale, "linear.weight": probe.coefficients.T,
            "linear.bias": probe.intercept + run.log_weights[target.name],
        }  # fmt: skip
        module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in values.items()})


def outputs_of(network: CaseNetwork, run: FoldRun, rows: np.ndarray, ranks: Ranks) -> dict[str, np.ndarray]:
    """By target, (N, K) logits of rows of the table, for the classes' true shares."""
    logits = _of_cases(network.logits, run, rows, network.device, ranks)
    return {name: values.astype(np.float64) - run.log_weights[name] for name, values in logits.items()}


def _of_cases(
    compute: Callable[[CaseVoxels], dict[str, np.ndarray]], run: FoldRun, rows: np.ndarray, device: torch.device,
    ranks: Ranks,
) -> dict[str, np.ndarray]:  # fmt: skip
    """By target, (N, F) float32 of what is computed of each case; ranks share the cases."""
    found: dict[str, np.ndarray] = {}
    for position in range(ranks.rank, len(rows), ranks.world):
        for target, values in compute(run.job.reader.read(run.job.table.cases[rows[position]])).items():
            found.setdefault(target, np.zeros((len(rows), len(values)), np.float32))[position] = values
    return {name: ranks.sum(torch.from_numpy(part).to(device)).cpu().numpy() for name, part in found.items()}


def _measure(state: TrainingState, network: CaseNetwork, run: FoldRun, ranks: Ranks) -> None:
    """Measure on the inner split, before the first step and after each epoch."""
    outputs = outputs_of(network, run, run.split.held_out, ranks)
    losses = []
    for target in run.job.table.targets:
        known = target.known[run.split.held_out]
        logits, labels = outputs[target.name][known], target.labels[run.split.held_out][known]
        if len(labels):  # at the best temperature: confidence is corrected afterwards anyway
            losses.append(cross_entropy(logits / fit_temperature(logits, labels), labels))
    row = {"epoch": float(len(state.history)), "inner_loss": float(np.mean(losses))}
    if state.losses:
        row["loss"] = float(np.mean(state.losses))
    state.add_epoch(row)
    shown = f"loss {row['loss']:.4f}, " if "loss" in row else ""
    inner = f"on the inner split {row['inner_loss']:.4f} (lowest {state.lowest:.4f})"
    say(f"fold {run.fold}, epoch {len(state.history) - 1} of {run.recipe.num_epochs}: {shown}{inner}")


def _finish(state: TrainingState, network: CaseNetwork, run: FoldRun, ranks: Ranks) -> None:
    """Calibrate the best weights on the inner split, predict the validation cases, and write all of it."""
    job, split = run.job, run.split
    state.model.load_state_dict(state.best)
    val = np.array(job.folds.validation[run.fold])
    inner, outputs = (outputs_of(network, run, rows, ranks) for rows in (split.held_out, val))
    temperatures, everything = {}, {}
    for target in job.table.targets:
        known = target.known[split.held_out]
        labels = target.labels[split.held_out][known]
        temperatures[target.name] = fit_temperature(inner[target.name][known], labels) if len(labels) else 1.0
        everything[target.name] = np.full((len(job.table.cases), len(target.classes)), np.nan)
        everything[target.name][split.held_out], everything[target.name][val] = inner[target.name], outputs[target.name]
    if ranks.rank:
        return
    arm = job.config.arm
    folder = job.fold_folder(arm, run.fold)
    sha256 = save_weights(folder / NETWORK, _corrected(state.best, run.log_weights, network.model.targets))
    write_json(folder / TRAINING, {
        "temperatures": temperatures, "sha256": sha256, "skipped_steps": state.skipped, "history": state.history,
        "inner_cases": [job.table.cases[row] for row in split.held_out],
    })  # fmt: skip
    if job.config.covariate:
        add_covariates(job, arm, run.fold, everything)
    write_predictions(job, arm, run.fold, outputs, temperatures, run.encoder)
    (folder / LATEST).unlink(missing_ok=True)
    say(f"wrote {folder}")


def _corrected(
    weights: Mapping[str, Tensor], log_weights: Mapping[str, np.ndarray], targets: Sequence[str]
) -> dict[str, Tensor]:
    """The weights with heads whose biases stand for the classes' true shares."""
    corrected = dict(weights)
    for number, target in enumerate(targets):
        name = f"heads.{number}.linear.bias"
        corrected[name] = weights[name] - torch.from_numpy(log_weights[target]).to(weights[name].dtype)
    return corrected


def check_folders(job: Job, folds: Sequence[int], resume: bool) -> list[int]:
    """The folds that are still to be trained.

    Raises:
        MiMError: a training would be overwritten, or there is nothing to continue.
    """
    folders = {fold: job.fold_folder(job.config.arm, fold) for fold in folds}
    finished = [fold for fold, folder in folders.items() if (folder / PREDICTIONS).is_file()]
    begun = [fold for fold, folder in folders.items() if fold in finished or (folder / LATEST).is_file()]
    if begun and not resume:
        raise MiMError(
            f"{folders[begun[0]]} holds another training: continue it with --c, keep it and choose a tag with -o, or "
            "delete it"
        )
    if resume and not begun:
        raise MiMError(f"--c: nothing to continue in {folders[folds[0]].parent}: leave out --c to start anew")
    return [fold for fold in folds if fold not in finished]


def check_batch(batch: int, n_devices: int) -> None:
    """Raise MiMError unless the devices can share a batch evenly."""
    if batch % n_devices:
        raise MiMError(f"--batch {batch} is the batch of all {n_devices} devices: make it a multiple of it")


