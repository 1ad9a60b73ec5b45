"""A checkpoint like the published one, its parameters by formula, and the inputs of the stored outputs.

Source: README of the golden outputs (published base architecture, arXiv 2404.15580).
"""

import argparse
import zlib

import numpy as np
import torch


def parameter(key, shape):
    """Value of the published parameter `key`: a sine seeded by the checksum of its name; float32."""
    n = int(np.prod(shape))
    v = np.sin(0.37 * np.arange(n, dtype=np.float64) + zlib.crc32(key.encode("utf-8")) % 1000)
    if len(shape) == 1:
        v = 1 + 0.1 * v if "norm" in key and key.endswith("weight") else 0.02 * v
    else:
        v = v / np.sqrt(n / shape[0])
    return torch.from_numpy(v.astype(np.float32).reshape(shape))


def images(shift):
    """(2, 1, 96, 96, 96) float32."""
    j = np.arange(96**3, dtype=np.float64)
    samples = [0.5 + 0.5 * np.sin(0.013 * j + shift), 0.5 + 0.5 * np.cos(0.0071 * j + 2 * shift)]
    return torch.from_numpy(np.stack(samples).astype(np.float32).reshape(2, 1, 96, 96, 96))


def checkpoint(shapes, sincos):
    """What the published code saves, beside the state dict its optimizer, counters and options.

    `shapes`: name → shape of all tensors; `sincos(grid, dim)`: (tokens, dim) fixed position embedding.
    """
    model = {
        key: torch.as_tensor(sincos((6, 6, 6), shape[2]), dtype=torch.float32)[None]
        if key.endswith("pos_embed")
        else parameter(key, shape)
        for key, shape in shapes.items()
    }
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}
    return {
        "model": model,
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}]},
        "epoch": 399,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(batch_size=16, tags=None, roi_x=96),
    }
