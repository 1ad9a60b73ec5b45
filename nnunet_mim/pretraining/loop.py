"""The pretraining loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.checkpoint import (
    FINAL,
    LATEST,
    build_checkpoint,
    case_records,
    load_checkpoint,
    merged_records,
    run_provenance,
    save_atomically,
)
from nnunet_mim.pretraining.dataset import Case, CropDataset
from nnunet_mim.pretraining.monitor import HeldOut, MetricsFile
from nnunet_mim.pretraining.nested_crops import nested_views
from nnunet_mim.pretraining.objective import add_figures, level_losses
from nnunet_mim.pretraining.schedules import learning_rates
from nnunet_mim.pretraining.sources import Source

LOG_EVERY = 10
MOST_GRAPHS = 64
"""of torch.compile: levels, times first, whole and last passes, with and without a parent"""


@dataclass(frozen=True)
class RunData:
    """What a run trains on, and the intensities that the losses need."""

    sources: list[Source]
    train: list[Case]
    val: list[Case]
    fold: int | str
    fill: tuple[float, ...]
    """per channel, the window's minimum"""
    flat_threshold: tuple[float, ...]
    """per channel, standard deviation below which a token is no target"""


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

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise MiMError(f"--workers must be 0 or more, got {self.workers}")
        if self.views_per_pass is not None and self.views_per_pass < 1:
            raise MiMError(f"--views_per_pass must be at least 1, got {self.views_per_pass}")
        if not set(self.recompute) <= {1, 2, 3}:
            raise MiMError(f"--recompute takes level numbers 1, 2, 3, got {self.recompute}")


def pretrain(
    config: PretrainConfig,
    data: RunData,
    folder: Path,
    fabric: Fabric,
    resume: bool,
    run: RunOptions,
) -> dict[str, float]:
    """Train until `config.iterations`, writing checkpoints, `train.csv`, `val.csv` and TensorBoard events into
    `folder`.

    Every random number depends on (seed, iteration) alone, so a resumed run continues as if it had not stopped.

    Args:
        config: what to compute.
        data: cases.
        folder: output folder, exists.
        fabric: launched; device and precision.
        resume: continue from `checkpoint_latest.pth`.
        run: how to compute it on this machine.

    Returns:
        figures of the last measurement on held-out crops.

    Raises:
        MiMError: the loss is not finite; the last checkpoint is kept.
    """
    levels = levels_of(config)
    torch.manual_seed(config.seed)
    model = MaskInMask(config.network, config.in_channels, alignment=config.alignment)
    optimizer = build_optimizer(model, config)
    start, history, seen = 0, [], case_records(data.train)
    if resume or config.init_checkpoint:
        stored = load_checkpoint(folder / LATEST if resume else Path(config.init_checkpoint))
        model.load_state_dict(stored["network_weights"])
        seen = merged_records(stored["provenance"]["cases"], seen)
    bare, network = model, model
    if run.compile:  # a graph for every level, and for a last pass with fewer views
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        network = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    model, optimizer = fabric.setup(network, optimizer)
    if resume:  # after the parameters have moved to their device: the optimiser's state follows them
        optimizer.load_state_dict(stored["resume_state"]["optimizer"])
        start, history = stored["provenance"]["iterations"], stored["provenance"]["loss_history"]
    schedule = learning_rates(config.iterations, config.learning_rate, config.warmup_fraction)

    fill = torch.tensor(data.fill, device=fabric.device)
    flat_threshold = torch.tensor(data.flat_threshold, device=fabric.device)
    place_threshold = flat_threshold if config.body_children else None
    val_crops = held_out_crops(data, config, fabric.device)
    held_out = HeldOut(*val_crops, fill, flat_threshold, levels, config, run.views_per_pass)
    train_file, val_file = (MetricsFile(folder / f"{part}.csv", start) for part in ("train", "val"))
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
    batches = training_batches(data, config, start, run.workers, fabric.device)

    def save(name: str, iteration: int, resumable: bool) -> None:
        provenance = run_provenance(data.sources, seen, data.fold, iteration, history)
        checkpoint = build_checkpoint(bare.state_dict(), config, provenance)
        if resumable:
            checkpoint["resume_state"] = {"optimizer": optimizer.state_dict()}
        save_atomically(checkpoint, folder / name)

    def log(file: MetricsFile, iteration: int, figures: dict[str, float]) -> None:
        file.append(iteration, figures)
        for name, value in figures.items():
            board.add_scalar(name, value, iteration)

    def measure_held_out() -> dict[str, float]:
        with fabric.autocast():  # eager: graphs without gradients would be compiled for nothing
            return held_out.evaluate(bare)

    val = measure_held_out()
    if start == 0:
        history.append({"iteration": 0, **val, **held_out.baselines})
        log(val_file, 0, {**val, **held_out.baselines})
    recent: list[dict[str, Tensor]] = []
    since = time.perf_counter()
    model.train()
    with tqdm(total=config.iterations, initial=start, desc="pretraining", unit="it", smoothing=0.05) as progress:
        for iteration in range(start, config.iterations):
            for group in optimizer.param_groups:
                group["lr"] = float(schedule[iteration])
            crops, valid, _ = next(batches)
            generator = torch.Generator(fabric.device).manual_seed(config.seed * 1_000_003 + 500_009 + iteration)
            views = nested_views(crops, valid, fill, levels, generator, place_threshold)

            step_figures: dict[str, Tensor] = {}
            for loss, figures, _ in level_losses(
                model, views, flat_threshold, config, run.views_per_pass, run.recompute
            ):
                fabric.backward(loss)  # pass by pass: activations of one at a time
                add_figures(step_figures, figures)
            norm = fabric.clip_gradients(model, optimizer, max_norm=config.grad_clip, error_if_nonfinite=False)
            step_figures["grad_norm"] = torch.as_tensor(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = iteration + 1
            recent.append(step_figures)
            measure = done % config.val_every == 0 or done == config.iterations
            due = done % config.save_every == 0
            if done % LOG_EVERY == 0 or measure or due:
                means = mean_figures(recent)
                if not math.isfinite(means["train/loss"] + means["train/grad_norm"]):
                    raise MiMError(
                        f"loss or gradient is not finite near iteration {done}: lower --lr, or continue with --c from "
                        f"the last checkpoint in {folder}"
                    )
                speed = len(recent) * config.batch_size / (time.perf_counter() - since)
                log(train_file, done, {**means, "lr": float(schedule[iteration]), "crops_per_s": speed})
                progress.set_postfix(progress_text(means, val, speed), refresh=False)
                progress.update(len(recent))
                recent, since = [], time.perf_counter()
            if measure:
                val = measure_held_out()
                history.append({"iteration": done, **means, **val, **held_out.baselines})
                log(val_file, done, {**val, **held_out.baselines})
                since = time.perf_counter()
            if due and done < config.iterations:
                save(LATEST, done, resumable=True)
    save(FINAL, config.iterations, resumable=False)
    (folder / LATEST).unlink(missing_ok=True)
    board.close()
    return {**val, **held_out.baselines}


def build_optimizer(model: MaskInMask, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and other vectors."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        vector = parameter.ndim < 2 or name.endswith("mask_token")
        (no_decay if vector else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def training_batches(
    data: RunData, config: PretrainConfig, start: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of iterations `start` to the last: crops (B, C, …), valid boxes (B, 3, 2) and case numbers, on the
    device.
    """
    dataset = CropDataset(
        data.train, levels_of(config)[0].fov, config.body_fraction, config.mirror_axes, seed=config.seed, stream=0
    )
    loader = DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=range(start * config.batch_size, config.iterations * config.batch_size),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    while True:
        try:
            crops, valid, cases = next(batches)
        except StopIteration:
            return
        except MiMError as error:  # a worker's comes with its traceback before the one line
            raise MiMError(str(error).strip().splitlines()[-1].split("MiMError: ")[-1]) from error
        yield crops.to(device, non_blocking=True), valid.to(device, non_blocking=True), cases


def held_out_crops(data: RunData, config: PretrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fixed crops of the held-out cases: (val_crops, C, …) and their valid boxes."""
    dataset = CropDataset(data.val, levels_of(config)[0].fov, body_fraction=1.0, seed=config.seed, stream=1)
    crops, valid, _ = zip(*(dataset[i] for i in range(config.val_crops)), strict=True)
    return torch.stack(crops).to(device), torch.stack(valid).to(device)


def mean_figures(figures: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean over iterations, read from the device in one go, plus the sum of the levels as `train/loss`.

    Reconstruction losses are weighted by their number of target tokens, as in HeldOut.
    """
    names = list(figures[0])
    values = torch.stack([torch.stack([step[name].float() for name in names]) for step in figures])
    columns = {name: values[:, i] for i, name in enumerate(names)}
    means = {}
    for name, column in columns.items():
        level, _, kind = name.partition("/")
        weight = columns[f"{level}/targets"] if kind == "reconstruction" else torch.ones_like(column)
        means[f"train/{name}"] = (column * weight).sum() / weight.sum().clamp(min=1)
    result = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
    return {**result, "train/loss": sum(value for name, value in result.items() if name.endswith("/loss"))}


def progress_text(train: dict[str, float], val: dict[str, float], speed: float) -> dict[str, str]:
    """What the progress bar shows beside speed and time left."""
    levels = [name.split("/")[1] for name in val if name.endswith("/reconstruction")]
    text = {f"L{level[-1]}": f"{train[f'train/{level}/reconstruction']:.3f}" for level in levels}
    text["val"] = "/".join(f"{val[f'val/{level}/reconstruction']:.3f}" for level in levels)
    text["crops/s"] = f"{speed:.2f}"
    return text
