"""Times the Triton kernels of the masked depthwise convolution for other tile sizes, beside what the GPU allows.

    python benchmarks/gpu/depthwise_tiles.py [--views 32] [--view 96] [--repeats 20]

The three stages of `base`, level 3 of the published ladder (half of the tokens visible), bf16. `limit` is the longer of
two times: that of the bytes (voxels read and written once) at the measured copy rate, and that of the FLOPs (2 x 125 a
voxel and channel) at the measured float32 matrix-product rate without TF32, since the sums are float32 ones.
"""

import argparse
import itertools
import math
import statistics
from functools import partial

import torch

from nnunet_mim.config import PRESETS
from nnunet_mim.networks import depthwise_triton as kernels

KERNEL = 5


def seconds(function, repeats):
    """Median seconds on the device."""
    times = []
    for repeat in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if repeat > 1:
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def machine(repeats):
    """Bytes and float32 FLOPs a second."""
    source = torch.empty(2**28, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.randn(8192, 8192, device="cuda")
    copy, product = seconds(lambda: target.copy_(source), repeats), seconds(lambda: a @ a, repeats)
    return 4 * source.numel() / copy, 2 * 8192**3 / product


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--view", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    bandwidth, flops = machine(options.repeats)
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth / 1e12:.2f} TB/s, float32 {flops / 1e12:.1f} TFLOP/s\n")
    print("| stage | rows x warps | forward ms | weight gradient ms | limit ms |\n|---|---|---|---|---|")
    network = PRESETS["base"]
    grid = [options.view // p for p in network.token_size]
    n_tokens, token = math.prod(grid), list(network.token_size)
    ids_keep = torch.rand(options.views, n_tokens, device="cuda").argsort(dim=1)[:, : n_tokens // 2]
    view = torch.arange(options.views, device="cuda").repeat_interleave(n_tokens // 2)
    ids = ids_keep.flatten()
    for stage in range(3):
        token = [t // s for t, s in zip(token, network.strides[stage], strict=True)]
        channels = network.embed_dims[stage]
        x = torch.randn(len(ids), *token, channels, device="cuda", dtype=torch.bfloat16)
        grad, weight = torch.randn_like(x), torch.randn(channels, 1, *[KERNEL] * 3, device="cuda")
        bias = torch.zeros(channels, device="cuda")
        table = kernels.slot_table(ids, view, options.views, grid, token, KERNEL)
        limit = max(4 * x.numel() / bandwidth, 2 * KERNEL**3 * x.numel() / flops)
        for rows, warps in itertools.product((64, 128, 256), (2, 4, 8)):
            kernels.ROWS, kernels.WARPS = rows, warps
            common = ids, view, table, grid, token
            forward = seconds(partial(kernels.convolve, x, weight, bias, *common), options.repeats)
            backward = seconds(partial(kernels.weight_gradient, x, grad, *common, KERNEL), options.repeats)
            times = " | ".join(f"{1000 * value:.2f}" for value in (forward, backward, limit))
            print(f"| {stage + 1} ({channels} x {token}) | {rows} x {warps} | {times} |")


if __name__ == "__main__":
    main()
