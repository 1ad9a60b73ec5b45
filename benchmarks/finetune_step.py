"""Time and memory of a finetuning step beside stock nnU-Net's networks, at the same patch and batch.

    python benchmarks/finetune_step.py [--preset base] [--patch 96 96 96] [--batch 2] [--device cpu|cuda] [--json]

Three networks: `mim` (HybridUNet as mim_plan plans it, AdamW), `plain` (nnU-Net's PlainConvUNet) and `resenc_l`
(ResidualEncoderUNet with the blocks of nnU-Net's ResEnc-L plans), both with the strides and features that nnU-Net's
planner gives for this patch and with SGD. All with deep supervision and nnU-Net's own loss; on a GPU as nnU-Net trains:
float16 with a gradient scaler, cudnn.benchmark, torch.compile (`--no-compile` leaves it out). One step is forward,
loss, backward, clipping, the optimiser. Networks take turns; figures are medians. Peak memory is that of a step above
the process's own before the network is built; on a CPU each network is measured in a process of its own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from process_memory import status_kb
from torch.utils.flop_counter import FlopCounterMode

from nnunet_mim.config import PRESETS
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.trainers.finetune_config import FinetuneConfig
from nnunet_mim.trainers.optim import build_optimizer

NETWORKS = ("mim", "plain", "resenc_l")
RESENC_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6)
N_CLASSES = 14
"""background and the 13 organs of BTCV"""


def build(name, options):
    """Network, optimiser, input, targets and loss of one step."""
    torch.manual_seed(0)
    patch = tuple(options.patch)
    if name == "mim":
        kwargs = plans_architecture(PRESETS[options.preset], patch)["arch_kwargs"]
        network = HybridUNet(1, N_CLASSES, True, **kwargs).to(options.device)
        optimizer = build_optimizer(network, FinetuneConfig())[0]
        scales = [[1 / n for n in steps] for steps in network.cumulative_strides[:-1]]
    else:
        _, strides, kernels, planned, _ = get_pool_and_conv_props((1.0, 1.0, 1.0), patch, 4, 999999)
        assert tuple(planned) == patch, f"nnU-Net would enlarge the patch to {tuple(planned)}"
        shared = {
            "n_stages": len(strides),
            "features_per_stage": [min(320, 32 * 2**stage) for stage in range(len(strides))],
            "conv_op": torch.nn.Conv3d, "kernel_sizes": kernels, "strides": strides, "num_classes": N_CLASSES,
            "conv_bias": True, "norm_op": torch.nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": torch.nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}, "deep_supervision": True,
        }  # fmt: skip
        if name == "plain":
            network = PlainConvUNet(1, n_conv_per_stage=2, n_conv_per_stage_decoder=2, **shared)
        else:
            blocks = RESENC_BLOCKS[: len(strides)]
            network = ResidualEncoderUNet(1, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1, **shared)
        network = network.to(options.device)
        optimizer = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
        scales = (1 / np.cumprod(np.array(strides), axis=0))[:-1].tolist()
    weights = np.array([1 / 2**i for i in range(len(scales))])
    weights[-1] = 0
    loss = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, weight_ce=1, weight_dice=1,
        dice_class=MemoryEfficientSoftDiceLoss,
    )  # fmt: skip
    image = torch.randn(options.batch, 1, *patch, device=options.device)
    sizes = [[round(n * s) for n, s in zip(patch, scale, strict=True)] for scale in scales]
    targets = [torch.randint(N_CLASSES, (options.batch, 1, *size), device=options.device) for size in sizes]
    if options.compile:
        network = torch.compile(network)
    scaler = torch.amp.GradScaler(options.device, enabled=options.device == "cuda")
    return network, optimizer, scaler, image, targets, DeepSupervisionWrapper(loss, weights / weights.sum())


def step(network, optimizer, scaler, image, targets, loss):
    """One optimiser step."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(image.device.type, torch.float16, enabled=image.is_cuda):
        value = loss(network(image), targets)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    scaler.step(optimizer)
    scaler.update()
    if image.is_cuda:
        torch.cuda.synchronize()


def forward_gflop(name, options):
    """Arithmetic of one forward pass of one patch, 2 per multiply-add; nothing is computed for it."""
    on_paper = argparse.Namespace(**{**vars(options), "device": "meta", "compile": False, "batch": 1})
    network, _, _, image, _, _ = build(name, on_paper)
    with FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() / 1e9


def built_on_gpu(name, options):
    """`build`, and the peak memory of a step, MB: of the second; kernels are chosen and compiled in the first."""
    before = torch.cuda.memory_allocated()
    parts = build(name, options)
    step(*parts)
    torch.cuda.reset_peak_memory_stats()
    step(*parts)
    return parts, (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(options):
    """In the child process: peak memory of two steps of one network (the second has the optimiser's state), MB."""
    before = status_kb("VmRSS")
    parts = build(options.measure, options)
    for _ in range(2):
        step(*parts)
    print((status_kb("VmHWM") - before) / 1024)


def peak_mb(name):
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--measure", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="base")
    add("--patch", type=int, nargs=3, default=(96, 96, 96))
    add("--batch", type=int, default=2)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--threads", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3)
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    add("--json", action="store_true", help="one JSON object as the last line")
    add("--measure", choices=NETWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    options.compile = options.device == "cuda" if options.compile is None else options.compile
    if options.measure:
        measure(options)
        return
    parts, peaks = {}, {}
    for name in NETWORKS:
        print(f"building {name}", file=sys.stderr, flush=True)
        if options.device == "cuda":
            parts[name], peaks[name] = built_on_gpu(name, options)
        else:
            parts[name] = build(name, options)
    seconds = {name: [] for name in NETWORKS}
    for repeat in range(options.repeats + 1):
        for name in NETWORKS:
            began = time.perf_counter()
            step(*parts[name])
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"median seconds a step: {', '.join(f'{name} {value:.4f}' for name, value in medians.items())}", flush=True)
    millions = {name: sum(p.numel() for p in parts[name][0].parameters()) / 1e6 for name in NETWORKS}
    del parts
    if options.device == "cpu":
        peaks = {name: peak_mb(name) if Path("/proc/self/status").exists() else None for name in NETWORKS}
    result = {f"{name}_s": value for name, value in medians.items()}
    result |= {f"ratio_to_{name}": medians["mim"] / medians[name] for name in NETWORKS[1:]}
    result |= {f"{name}_peak_mb": value for name, value in peaks.items() if value is not None}
    gflop = {name: forward_gflop(name, options) for name in NETWORKS}
    result |= {f"{name}_forward_gflop": value for name, value in gflop.items()}
    result |= {f"{name}_million_parameters": value for name, value in millions.items()}
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(f"torch {torch.__version__}, {platform.machine()}, {device}; {' '.join(sys.argv[1:])}\n")
    print("| network | million parameters | GFLOP forward, one patch | s a step | mim is | peak MB |")
    print("|---" * 6 + "|")
    for name in NETWORKS:
        ratio = f"{medians[name] / medians['mim']:.2f} times as fast" if name != "mim" else ""
        peak = "-" if peaks[name] is None else f"{peaks[name]:.0f}"
        print(f"| {name} | {millions[name]:.1f} | {gflop[name]:.0f} | {medians[name]:.3f} | {ratio} | {peak} |")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
