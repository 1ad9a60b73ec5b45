"""Depthwise 5x5x5 convolution on a CPU: forward and backward, PyTorch's own against the package's, in turns.

    python benchmarks/depthwise.py [--repeats 5] [--threads 2] [--shapes NxCxSIZE ...] [--json]

Each shape is N x C x size^3, nothing masked. Medians in seconds of
  torch                 nn.functional.conv3d and its autograd, contiguous tensors
  torch channels last   the same in channels-last layout
  products              input gradient as a forward convolution, weight gradient as 25 batched matrix products
  ours                  nnunet_mim.networks.depthwise.conv_on_patches, channels-last tensors
  ours contiguous       the same given contiguous tensors, the change of layout included
and the largest difference of any gradient of `ours` to PyTorch's, relative to its largest value.
"""

import argparse
import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from nnunet_mim.networks.depthwise import DepthwiseConv3d, conv_on_patches


def torch_conv(conv, x):
    return F.conv3d(x, conv.weight, conv.bias, padding=2, groups=conv.groups)


def our_conv(conv, x):
    convolve = conv_on_patches(x.shape[0], x.device)
    return convolve(conv, x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Products(torch.autograd.Function):
    """For each offset (i, j): (C, Z+4, R)·(C, R, Z) with R = N·X·Y, then sums along the five diagonals."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, bias, padding=2, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        channels, (size_x, size_y, size_z) = len(weight), x.shape[2:]
        grad_x = F.conv3d(grad, weight.flip(2, 3, 4), padding=2, groups=channels)
        padded = F.pad(x, [2] * 6).transpose(0, 1)
        right = grad.transpose(0, 1).reshape(channels, -1, size_z)
        grad_weight = torch.empty_like(weight)
        for i in range(5):
            for j in range(5):
                left = padded[:, :, i : i + size_x, j : j + size_y].reshape(channels, -1, size_z + 4)
                product = left.transpose(1, 2) @ right
                for k in range(5):
                    grad_weight[:, 0, i, j, k] = product.diagonal(-k, 1, 2)[:, :size_z].sum(dim=1)
        return grad_x, grad_weight, grad.sum(dim=(0, 2, 3, 4))


def products_conv(conv, x):
    return Products.apply(x, conv.weight, conv.bias)


def timed(function, conv, x, grad):
    """Seconds of one forward and backward pass, and the gradients."""
    conv.zero_grad()
    start = time.perf_counter()
    x = x.detach().requires_grad_()
    function(conv, x).backward(grad)
    return time.perf_counter() - start, [x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()]


def compare(n, channels, size, repeats):
    """Medians by name, and the difference of our gradients."""
    conv = DepthwiseConv3d(channels)
    plain = [torch.randn(n, channels, size, size, size) for _ in range(2)]
    last = [t.contiguous(memory_format=torch.channels_last_3d) for t in plain]
    contenders = {
        "torch": (torch_conv, plain),
        "torch channels last": (torch_conv, last),
        "products": (products_conv, plain),
        "ours": (our_conv, last),
        "ours contiguous": (our_conv, plain),
    }
    seconds = {name: [] for name in contenders}
    gradients = {}
    for repeat in range(repeats + 1):  # the first round is left out
        for name, (function, tensors) in contenders.items():
            duration, gradients[name] = timed(function, conv, *tensors)
            if repeat:
                seconds[name].append(duration)
    pairs = [(a, b) for name in contenders for a, b in zip(gradients[name], gradients["torch"], strict=True)]
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return {name: statistics.median(values) for name, values in seconds.items()}, difference


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=["16x12x32", "2x48x48", "2x96x24", "2x192x12"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, {options.repeats} repeats\n")
    columns = ("torch", "torch channels last", "products", "ours", "ours contiguous")
    print(f"| N x C x size³ | {' | '.join(columns)} | torch / ours | difference |")
    print("|---" * (len(columns) + 3) + "|")
    rows = []
    for shape in options.shapes:
        n, channels, size = (int(number) for number in shape.split("x"))
        medians, difference = compare(n, channels, size, options.repeats)
        speedup = medians["torch"] / medians["ours"]
        rows.append({"shape": [n, channels, size], **medians, "speedup": speedup, "difference": difference})
        times = " | ".join(f"{medians[name]:.3f}" for name in columns)
        print(f"| {n} x {channels} x {size}³ | {times} | {speedup:.1f} | {difference:.1e} |")
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": options.threads, "rows": rows}))


if __name__ == "__main__":
    main()
