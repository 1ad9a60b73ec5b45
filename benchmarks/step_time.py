"""Time and memory of pretraining's forward and backward pass.

    python benchmarks/step_time.py --preset base --view 96 --batch 2 --ratio 0.6 --device cpu --repeats 3 --json

One level: `--batch` views with `--ratio` of their tokens masked, computed in turns by `visible` (what mim_pretrain
runs) and by `dense` (the same masked computation on all voxels and all tokens, with torch's own conv3d in its default
layout; `dense_channels_last` is the same in channels-last layout). Same weights, masks and targets. Medians. Peak
memory is that above the process's own before the pass, each path in a process of its own.

    python benchmarks/step_time.py --full-crop --preset base --view 96 --repeats 3 --json

All levels of one crop as mim_pretrain runs them, the FLOPs counted by hand (flops.py; those that the visible
tokens need), and their rate beside that of a large matrix product on the same machine. `--dense` times the dense
computation only, for both. With `--unet` also the U-Net of `--decoder unet`, which learns in some of the iterations:
`ratio` is the mean cost of an iteration beside one without it. `--profile` shows what each path of one level spends
its time on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from dense_encoder import encode_dense
from flops import crop_flops, dense_view_flops, view_flops
from process_memory import status_kb

from nnunet_mim.config import PRESETS, PretrainConfig
from nnunet_mim.geometry import levels_of, views_per_crop
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.networks.mask_in_mask import MaskedViews, MaskInMask, Reconstruction
from nnunet_mim.networks.token_layout import tokens_from_grid
from nnunet_mim.pretraining.objective.levels import level_losses, unet_losses
from nnunet_mim.pretraining.objective.losses import reconstruction_loss
from nnunet_mim.pretraining.objective.masks import mask_of
from nnunet_mim.pretraining.objective.views import nested_views
from nnunet_mim.pretraining.options import VIEWS_PER_PASS

PATHS = ("dense", "dense_channels_last", "visible")


class Dense(torch.nn.Module):
    """The dense masked computation behind MaskInMask's interface."""

    def __init__(self, model, memory_format=torch.contiguous_format):
        super().__init__()
        self.model, self.memory_format = model, memory_format

    def encode(self, images, ids_masked):
        mask = mask_of(ids_masked, images[0, 0].numel() // torch.tensor(self.model.encoder.token_size).prod().item())
        return encode_dense(self.model.encoder, images, mask, self.memory_format)

    def forward(self, groups, recompute=False):
        assert not recompute
        return [self.reconstruct(*group) for group in groups]

    def reconstruct(self, images, ids_keep, ids_masked):
        model = self.model
        features = model.decoder(self.encode(images, ids_masked), ids_keep, model.encoder.grid(images))
        rows = torch.arange(images.shape[0], device=images.device)[:, None]
        return Reconstruction(model.decoder.head(features)[rows, ids_masked], features)

    def align(self, *inputs):
        return self.model.align(*inputs)


def build(options):
    """Model, images, and the raster numbers of visible and masked tokens, the same for every path and process."""
    torch.manual_seed(0)
    network = PRESETS[options.preset]
    size = [options.view] * 3
    unet = plans_architecture(network, size)["arch_kwargs"] if options.unet else None
    model = MaskInMask(network, alignment="infonce" if options.full_crop else "none", unet=unet).to(options.device)
    images = torch.randn(options.batch, 1, *size, device=options.device)
    n_tokens = images[0].numel() // torch.tensor(network.token_size).prod().item()
    order = torch.rand(options.batch, n_tokens, device=options.device).argsort(dim=1)
    n_visible = int(n_tokens * (1 - options.ratio) + 1e-6)
    keep, masked = order.split([n_visible, n_tokens - n_visible], dim=1)
    return model, images, keep.sort(dim=1).values, masked.sort(dim=1).values


def path_model(model, path):
    layout = {"dense": torch.contiguous_format, "dense_channels_last": torch.channels_last_3d}
    return Dense(model, layout[path]) if path in layout else model


def level_step(model, path, images, keep, masked):
    """Forward and backward of one level; returns its loss."""
    rows = torch.arange(images.shape[0], device=images.device)[:, None]
    tokens = tokens_from_grid(images.permute(0, 2, 3, 4, 1), model.encoder.token_size)[rows, masked].flatten(2)
    every = torch.ones_like(masked, dtype=torch.bool)
    (output,) = path_model(model, path)([MaskedViews(images, keep, masked)])
    loss = reconstruction_loss(output.prediction, tokens, every)
    loss.backward()
    return loss.detach()


def encoder_step(model, path, images, keep, masked):
    """Forward and backward of the encoder alone."""
    latent = model.encoder(images, keep) if path == "visible" else path_model(model, path).encode(images, masked)
    latent.square().mean().backward()
    return latent.detach().sum()


def crop_step(model, path, options):
    """Forward and backward of all levels of one crop; path `unet`: of the U-Net on its views of this crop alone."""
    config = crop_config(options)
    levels = levels_of(config)
    torch.manual_seed(1)
    crop = torch.randn(1, 1, *levels[0].fov, device=options.device)
    valid = torch.tensor([[[0, n] for n in levels[0].fov]], device=options.device)
    fill, flat = torch.zeros(1, device=options.device), torch.zeros(1, device=options.device)
    generator = torch.Generator(options.device).manual_seed(0)
    total = torch.zeros((), device=options.device)
    views = nested_views(crop, valid, fill, levels, generator, flat)
    losses = unet_losses if path == "unet" else level_losses
    for loss, _ in losses(path_model(model, path), views, flat, config, options.views_per_pass):
        loss.backward()
        total += loss.detach()
    return total


def crop_config(options):
    config = PretrainConfig(preset=options.preset, view_size=(options.view,) * 3)
    return replace(config, n_children=tuple(options.children))


def timed(step, model, device):
    """Seconds and the result of one step, from gradients that are not there yet."""
    model.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, float(result)


def in_turns(step, paths, model, repeats, device):
    """Medians of the seconds of every path, the first round left out; and every path's last result."""
    seconds = {path: [] for path in paths}
    results = {}
    for repeat in range(repeats + 1):
        for path in paths:
            duration, results[path] = timed(lambda path=path: step(path), model, device)
            if repeat:
                seconds[path].append(duration)
    return {path: statistics.median(values) for path, values in seconds.items()}, results


def peak_mb(options, path):
    """Peak memory of one step above the process's own, in a process of its own; MB of 2^20 bytes."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--measure", path]
    # with this glibc gives large blocks back as soon as they are free; else a fifth of the peak is what it keeps
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.strip().splitlines()[-1])


def measure(options):
    """In the child process: one step of one path, and its peak memory."""
    model, *inputs = build(options)
    step = (lambda: crop_step(model, options.measure, options)) if options.full_crop else (
        lambda: level_step(model, options.measure, *inputs)
    )  # fmt: skip
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = status_kb("VmRSS")
        step()
        peak = 1024 * (status_kb("VmHWM") - before)
    print(peak / 2**20)


def matrix_gflops(device, size=2048, repeats=5):
    """GFLOP/s of a large float32 matrix product."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    medians, _ = in_turns(lambda _: (a @ b).sum(), ["product"], torch.nn.Module(), repeats, device)
    return 2 * size**3 / medians["product"] / 1e9


def one_level(options):
    paths = ("dense",) if options.dense else PATHS
    model, images, keep, masked = build(options)
    seconds, losses = in_turns(
        lambda path: level_step(model, path, images, keep, masked), paths, model, options.repeats, options.device
    )
    encoder, _ = in_turns(
        lambda path: encoder_step(model, path, images, keep, masked), paths, model, options.repeats, options.device
    )
    result = {f"{path}_s": seconds[path] for path in paths} | {f"encoder_{path}_s": encoder[path] for path in paths}
    if not options.dense:
        n_visible, n_tokens = keep.shape[1], keep.shape[1] + masked.shape[1]
        counts = [count(model.encoder.config, 1, n_visible, n_tokens) for count in (dense_view_flops, view_flops)]
        result |= {
            "speedup": seconds["dense"] / seconds["visible"],
            "speedup_over_channels_last": seconds["dense_channels_last"] / seconds["visible"],
            "encoder_speedup": encoder["dense"] / encoder["visible"],
            "flop_ratio": counts[0] / counts[1],
            "max_abs_loss_diff": max(abs(losses[path] - losses["visible"]) for path in paths),
        }
    if options.device == "cuda" or Path("/proc/self/clear_refs").exists():
        result |= {f"{path}_peak_mb": peak_mb(options, path) for path in paths}
        if not options.dense:
            result["peak_ratio"] = result["visible_peak_mb"] / result["dense_peak_mb"]
    return result


def profile(options):
    """Print the ten operations that take longest in one level, for each path."""
    model, *inputs = build(options)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if options.device == "cuda" else []
    for path in PATHS:
        level_step(model, path, *inputs)
        with torch.profiler.profile(activities=kinds) as profiler:
            level_step(model, path, *inputs)
        time_of = attrgetter("self_device_time_total" if options.device == "cuda" else "self_cpu_time_total")
        rows = sorted(profiler.key_averages(), key=time_of, reverse=True)
        total = sum(time_of(row) for row in rows)
        print(f"\n{path}: {total / 1e6:.2f} s\n\n| operation | s | share | calls |\n|---|---|---|---|")
        for row in rows[:10]:
            print(f"| {row.key} | {time_of(row) / 1e6:.3f} | {time_of(row) / total:.1%} | {row.count} |")


def full_crop(options):
    path = "dense" if options.dense else "visible"
    model, *_ = build(options)
    paths = [path, "unet"] if options.unet else [path]
    seconds, _ = in_turns(lambda path: crop_step(model, path, options), paths, model, options.repeats, options.device)
    config = crop_config(options)
    gflop = crop_flops(config.network, 1, levels_of(config)) / 1e9
    machine = matrix_gflops(options.device)
    rate = gflop / seconds[path]
    result = {
        "views": sum(views_per_crop(levels_of(config))),
        "seconds": seconds[path],
        "crops_per_s": 1 / seconds[path],
        "gflop": gflop,
        "gflop_per_s": rate,
        "matrix_gflop_per_s": machine,
        "share_of_matrix_rate": rate / machine,
    }
    if options.unet:
        result |= {"unet_s": seconds["unet"], "unet_every": config.unet_every}
        result["ratio"] = 1 + seconds["unet"] / config.unet_every / seconds[path]
    if options.device == "cuda" or Path("/proc/self/clear_refs").exists():
        result["peak_mb"] = peak_mb(options, path)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="base")
    add("--view", type=int, default=96, help="voxels per axis")
    add("--batch", type=int, default=2, help="views of the one level")
    add("--ratio", type=float, default=0.6, help="masked share of the one level")
    add("--full-crop", action="store_true", help="all levels of one crop")
    add("--unet", action="store_true", help="with --full-crop")
    add("--children", type=int, nargs=2, default=(4, 4), help="with --full-crop")
    add("--views_per_pass", type=int, help="with --full-crop (default: that of mim_pretrain on the device)")
    add("--dense", action="store_true", help="time the dense computation only")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3)
    add("--profile", action="store_true", help="of one level instead: what each path spends its time on, top ten")
    add("--json", action="store_true", help="one JSON object as the last line")
    add("--measure", choices=PATHS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.views_per_pass is None:
        options.views_per_pass = VIEWS_PER_PASS.get(options.device)
    if options.measure:
        measure(options)
        return
    if options.profile:
        profile(options)
        return
    result = full_crop(options) if options.full_crop else one_level(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(f"torch {torch.__version__}, {platform.machine()}, {device}; {' '.join(sys.argv[1:])}\n")
    print("| figure | value |\n|---|---|")
    for name, value in result.items():
        print(f"| {name} | {value:.4g} |")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
