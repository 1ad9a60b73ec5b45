"""The published model's parameters by formula, its stored inputs, and what its keys are called here.

Source: README of the golden outputs (published base architecture, arXiv 2404.15580).
"""

import re
import zlib

import numpy as np
import torch

COMPUTED = ("pos_embed", "decoder_pos_embed")
"""Published keys that are no parameters here: positions are computed."""

RENAMES = (
    (r"patch_embed([123])\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.embed."),
    (r"patch_embed4\.", "encoder.token_embed."),
    (r"patch_embed5\.", "encoder.token_proj."),
    (r"stage([123])_output_decode\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.to_token."),
    (r"blocks([123])\.(\d+)\.attn\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.blocks.{m[2]}.dwconv."),
    (r"blocks([123])\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.blocks."),
    (r"blocks4\.", "encoder.vit_blocks."),
    (r"norm\.", "encoder.norm."),
    (r"mask_token", "decoder.mask_token"),
    (r"decoder_embed\.", "decoder.embed."),
    (r"decoder_blocks\.", "decoder.blocks."),
    (r"decoder_norm\.", "decoder.norm."),
    (r"decoder_pred\.", "decoder.head."),
    (r"aggregate_mid\.", "projectors.child.0."),
    (r"aggregate_pred_up_feature\.", "projectors.parent.0."),
    (r"aggregate_down\.", "projectors.child.1."),
    (r"aggregate_pred_mid_feature\.", "projectors.parent.1."),
)


def our_key(published):
    """Name of a published parameter in MaskInMask, or None for what is computed here. KeyError: unknown."""
    if published in COMPUTED:
        return None
    for pattern, name in RENAMES:
        if re.match(pattern, published):
            return re.sub(f"^{pattern}", name, published, count=1)
    raise KeyError(published)


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
