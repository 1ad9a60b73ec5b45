"""Checks every way a pretraining step runs on a GPU against float64 on the CPU, then times them all.

    python benchmarks/gpu/gpu_paths.py [--presets tiny small base large] [--view 96] [--batch 2] [--no-check] [--json]

A path is `torch` or `triton` (the depthwise convolution) and `eager`, `recorded` (a CUDA graph, the default of
mim_pretrain on one GPU; the operations are those of `eager`) or `compiled`. Timed is a whole optimiser step of
mim_pretrain in bf16: views cut and masked on the device, all levels forward and backward, clipping, AdamW. `share` is
that of the measured bf16 matrix-product rate, with FLOPs counted by hand (../flops.py). `waits` says whether the
host ever waited for the device. With `--device cpu` the script itself can be tried without a GPU.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from nnunet_mim.config import PRESETS, NetworkConfig, PretrainConfig
from nnunet_mim.geometry import levels_of, views_per_crop
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.half_precision import HalfPrecisionCopy
from nnunet_mim.pretraining.objective.levels import level_losses
from nnunet_mim.pretraining.objective.views import LevelViews, nested_views
from nnunet_mim.pretraining.state import build_optimizer
from nnunet_mim.pretraining.step import WARM_UP, RecordedStep, SizedStep, ordinary_step

sys.path.append(str(Path(__file__).parents[1]))
from flops import crop_flops

PATHS = (("torch", "eager"), ("triton", "eager"), ("triton", "recorded"), ("triton", "compiled"))
EXPECTED = {  # preset, view, crops → crops/s of a recorded step on an H100: derived for the code before, and the goal
    ("small", 96, 2): ((21, 29), None),
    ("base", 96, 2): ((13, 19), 40),
    ("large", 96, 2): ((9, 13), None),
    ("small", 64, 8): ((148, 178), 500),  # the former figures are measured
}
CHECKED = {  # what is compared → largest ‖out − ref‖ / ‖ref‖ of the loss's gradient
    "float64": 1e-9,
    "float32": 1e-3,
    "bf16": 5e-2,
}
ANISOTROPIC = NetworkConfig(
    (12, 24, 48, 96), (1, 2, 1, 2), 3, strides=((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=4,
)  # fmt: skip


PRECISION = {"float64": "64-true", "float32": "32-true", "bf16": "bf16-mixed"}


def fabric_on(device, precision):
    return Fabric(accelerator=device, devices=1, precision=precision)


def use(path):
    """Choose the depthwise convolution of the models that run next."""
    os.environ["NNUNET_MIM_TRITON"] = "1" if path == "triton" else "0"


def config_of(preset, view, batch, n_children=(4, 4)):
    network = ANISOTROPIC if preset == "anisotropic" else PRESETS[preset]
    view = tuple(p * (view // 16) for p in network.token_size)
    return PretrainConfig(preset=preset, network=network, view_size=view, batch_size=batch, n_children=n_children)


def inputs_of(config, device, dtype=torch.float32):
    fov = levels_of(config)[0].fov
    torch.manual_seed(1)
    crops = torch.randn(config.batch_size, 1, *fov, dtype=dtype)
    valid = torch.tensor([[[0, n] for n in fov]] * config.batch_size)
    return crops.to(device), valid.to(device)


def moved(view, device, dtype):
    """The same views on another device."""
    fields = {name: getattr(view, name) for name in view.__dataclass_fields__}
    return LevelViews(
        **{k: v.to(device) if torch.is_tensor(v) else v for k, v in fields.items() if k != "images"},
        images=view.images.to(device, dtype),
    )


def loss_and_gradient(bare, forward, views, config):
    """Loss and gradient as the loop of mim_pretrain computes them; `forward` is `bare`, or computes for it."""
    flat = torch.full((1,), 0.04, device=views[0].images.device, dtype=views[0].images.dtype)
    total = 0.0
    for loss, _ in level_losses(forward, views, flat, config):
        loss.backward()
        if isinstance(forward, HalfPrecisionCopy):
            forward.give_gradients()
        total += loss.item()
    return total, torch.cat([p.grad.flatten().double().cpu() for p in bare.parameters()])


def computes_for(model, precision, mode):
    """What computes a step of `model`."""
    if precision == "bf16":
        return HalfPrecisionCopy(model, mode == "compiled")
    return torch.compile(model, fullgraph=True, dynamic=False) if mode == "compiled" else model


def check(device, paths):
    """Compare every path with the CPU in float64; returns rows and whether all are within bounds."""
    rows = []
    for preset in ("tiny", "anisotropic"):
        config = replace(config_of(preset, 64, 1), n_children=(2, 2))
        torch.manual_seed(0)
        reference = MaskInMask(config.network).double()
        crops, valid = inputs_of(config, "cpu", torch.float64)
        fill, flat = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.04, dtype=torch.float64)
        views = nested_views(crops, valid, fill, levels_of(config), torch.Generator().manual_seed(0), flat)
        wanted, gradient = loss_and_gradient(reference, reference, views, config)
        for convolution, mode in paths:
            use(convolution)
            for precision, bound in CHECKED.items():
                dtype = torch.float64 if precision == "float64" else torch.float32
                model = copy.deepcopy(reference).to(device, dtype)
                model.zero_grad()
                there = [moved(view, device, dtype) for view in views]
                forward = computes_for(model, precision, mode)
                found, found_gradient = loss_and_gradient(model, forward, there, config)
                error = float((found_gradient - gradient).norm() / gradient.norm())
                rows.append((preset, convolution, mode, precision, abs(found - wanted) / wanted, error, error <= bound))
                torch._dynamo.reset()
    return rows


def bf16_rate(device, size=8192, repeats=20):
    """FLOP/s of a large bf16 matrix product."""
    size = size if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def make_step(config, device, mode):
    """A function that does one optimiser step."""
    torch.manual_seed(0)
    bare = MaskInMask(config.network)
    fabric = fabric_on(device, "bf16-mixed")
    fabric.to_device(bare)
    forward, optimizer = computes_for(bare, "bf16", mode), build_optimizer(bare, config)
    crops, valid = inputs_of(config, device)
    fill, flat = torch.zeros(1, device=device), torch.full((1,), 0.04, device=device)
    generator, levels = torch.Generator(device).manual_seed(0), levels_of(config)

    def in_passes_of(views):
        return ordinary_step(forward, bare, optimizer, flat, config, ALONE, views)

    on_gpu = device == "cuda"
    train_step = SizedStep(in_passes_of, torch.device(device)) if on_gpu else in_passes_of(4)  # as mim_pretrain does
    if mode == "recorded":
        train_step = RecordedStep(train_step, optimizer)

    def step():
        train_step(nested_views(crops, valid, fill, levels, generator, flat))

    return step


def time_path(config, device, mode, steps):
    """Median seconds of a step, MiB of memory, and whether the host never waited. Memory is the most that a step has
    in use; of a recorded one what stays reserved, as replays allocate nothing.
    """
    step = make_step(config, device, mode)
    for _ in range(WARM_UP + 1):
        step()
    synchronize(device)
    waited = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            waited = False
        except RuntimeError as error:
            print(f"a step waits for the device: {error}")
            waited = True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seconds = []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = float("nan")
    if device == "cuda":
        torch.cuda.empty_cache()
        peak = (torch.cuda.memory_reserved() if mode == "recorded" else torch.cuda.max_memory_allocated()) / 2**20
    return statistics.median(seconds), peak, waited


def profile(config, device, mode, steps=3):
    step = make_step(config, device, mode)
    step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    return profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=10, max_name_column_width=60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    add("--view", type=int, default=96)
    add("--batch", type=int, default=2, help="crops a step")
    add("--children", type=int, nargs=2, default=(4, 4))
    add("--no-check", action="store_true", help="only the times")
    add("--steps", type=int, default=10)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    modes = ["eager", "recorded", "compiled"]
    add("--modes", nargs="+", choices=modes, help="default: all; without a GPU nothing can be recorded")
    add("--json", action="store_true")
    options = parser.parse_args()
    device = options.device
    options.modes = options.modes or [mode for mode in modes if device == "cuda" or mode != "recorded"]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}\n")

    paths = [path for path in PATHS if path[1] in options.modes]
    checks = [] if options.no_check else check(device, [path for path in paths if path[1] != "recorded"])
    print("| check | convolution | mode | precision | loss | gradient | within bounds |\n|---|---|---|---|---|---|---|")
    for *what, loss, error, good in checks:
        print(f"| {' | '.join(what)} | {loss:.1e} | {error:.1e} | {'yes' if good else 'NO'} |")

    rate = bf16_rate(device)
    print(f"\nbf16 matrix product: {rate / 1e12:.0f} TFLOP/s\n")
    print("| preset | convolution | mode | crops/s | before, goal | TFLOP/s | share | peak MiB | waits |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for preset in options.presets:
        config = config_of(preset, options.view, options.batch, tuple(options.children))
        flops = crop_flops(config.network, 1, levels_of(config))
        for convolution, mode in paths:
            use(convolution)
            torch._dynamo.reset()
            try:
                seconds, peak, waited = time_path(config, device, mode, options.steps)
            except torch.OutOfMemoryError:
                print(f"| {preset} | {convolution} | {mode} | out of memory | | | | | |")
                continue
            speed = config.batch_size / seconds
            before, goal = EXPECTED.get((preset, options.view, options.batch), ((), None))
            expected = ", ".join(["–".join(map(str, before)), *([str(goal)] if goal else [])])
            rows.append(
                {
                    "preset": preset, "convolution": convolution, "mode": mode, "crops_per_s": speed,
                    "tflop_per_s": speed * flops / 1e12, "share": speed * flops / rate, "peak_mib": peak,
                    "waits": waited, "before": before, "goal": goal,
                }
            )  # fmt: skip
            print(
                f"| {preset} | {convolution} | {mode} | {speed:.2f} | {expected} | {speed * flops / 1e12:.1f} | "
                f"{speed * flops / rate:.3f} | {peak:.0f} | {waited} |"
            )
    last = options.presets[-1] if "base" not in options.presets else "base"
    config = config_of(last, options.view, options.batch, tuple(options.children))
    views = sum(views_per_crop(levels_of(config)))
    use("triton")
    print(f"\nprofile, {last}, triton, eager, {views} views a crop:\n{profile(config, device, 'eager')}")
    if options.json:
        names = ("preset", "convolution", "mode", "precision", "loss", "gradient", "within_bounds")
        found = [dict(zip(names, row, strict=True)) for row in checks]
        machine = {"device": name, "torch": torch.__version__, "bf16_tflop_per_s": rate / 1e12}
        print(json.dumps({**machine, "checks": found, "rows": rows}))
    if not all(row[-1] for row in checks):
        raise SystemExit("a path differs from float64 on the CPU by more than its bound")


if __name__ == "__main__":
    main()
