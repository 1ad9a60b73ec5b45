"""Depthwise 5x5x5 convolution on a CPU: forward and backward, PyTorch's own against the package's, in turns.

    python benchmarks/depthwise.py [--repeats 5] [--threads 2] [--json]

Each shape is N x C x size^3. `torch` is nn.functional.conv3d and its autograd on contiguous tensors, `torch channels
last` the same in channels-last layout, `ours` nnunet_mim.networks.depthwise.conv_on_patches. Medians, and the largest
difference of any gradient to PyTorch's, relative to its largest value.
"""

import argparse
import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from nnunet_mim.networks.depthwise import DepthwiseConv3d, conv_on_patches


def torch_step(x, conv):
    x = x.detach().requires_grad_()
    y = F.conv3d(x, conv.weight, conv.bias, padding=2, groups=conv.groups)
    return x, y


def ours_step(x, conv):
    x = x.detach().requires_grad_()
    convolve = conv_on_patches(x.shape[0], x.device)
    return x, convolve(conv, x.permute(0, 2, 3, 4, 1).unsqueeze(1)).squeeze(1).permute(0, 4, 1, 2, 3)


def timed(step, x, conv, grad):
    conv.zero_grad()
    start = time.perf_counter()
    x, y = step(x, conv)
    y.backward(grad)
    return time.perf_counter() - start, [x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", nargs="+", default=["16x12x32", "2x48x48", "2x96x24", "2x192x12"], help="NxCxsize")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads, {args.repeats} repeats")
    print("| N x C x size³ | torch (s) | torch channels last (s) | ours (s) | speed-up | largest relative difference |")
    print("|---|---|---|---|---|---|")
    rows = []
    for n, c, size in ([int(number) for number in shape.split("x")] for shape in args.shapes):
        conv = DepthwiseConv3d(c)
        x, grad = torch.randn(n, c, size, size, size), torch.randn(n, c, size, size, size)
        last = [t.contiguous(memory_format=torch.channels_last_3d) for t in (x, grad)]
        times: dict[str, list[float]] = {"torch": [], "channels_last": [], "ours": []}
        for repeat in range(args.repeats + 1):
            for name, step, pair in (
                ("torch", torch_step, (x, grad)), ("channels_last", torch_step, last), ("ours", ours_step, last),
            ):  # fmt: skip
                seconds, gradients = timed(step, pair[0], conv, pair[1])
                if repeat:
                    times[name].append(seconds)
                if name == "torch":
                    expected = gradients
                if name == "ours":
                    difference = max(
                        float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients, expected, strict=True)
                    )
        medians = {name: statistics.median(values) for name, values in times.items()}
        speedup = medians["torch"] / medians["ours"]
        rows.append({"shape": [n, c, size], **medians, "speedup": speedup, "difference": difference})
        print(
            f"| {n} x {c} x {size}³ | {medians['torch']:.3f} | {medians['channels_last']:.3f} | {medians['ours']:.3f} "
            f"| {speedup:.1f} | {difference:.1e} |"
        )
    if args.json:
        print(json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main()
