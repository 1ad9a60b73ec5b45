"""Twins of encoder and decoder: the whole masked computation on dense, channels-first maps, in plain functions.

Source: section 2 of the project's design (MiM, arXiv 2404.15580; ViT blocks as in arXiv 2010.11929). Parameters come
from a state dict; no module of the package is used.
"""

import math

import torch
import torch.nn.functional as F


def sincos(grid, dim):
    """(tokens, dim) float64: thirds for the three axes in array order, each [sin | cos], ω_i = 10000^(−i/(dim/6))."""
    rows = []
    for x in range(grid[0]):
        for y in range(grid[1]):
            for z in range(grid[2]):
                row = []
                for index in (x, y, z):
                    angles = [index * 10000 ** (-i / (dim / 6)) for i in range(dim // 6)]
                    row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def depthwise(x, weight, bias):
    """(C, X, Y, Z) with a kernel (C, 1, k, k, k), zero padding: one kernel offset after the other."""
    half = weight.shape[-1] // 2
    padded = F.pad(x, [half] * 6)
    y = bias[:, None, None, None].expand_as(x)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            for k in range(weight.shape[4]):
                part = padded[:, i : i + x.shape[1], j : j + x.shape[2], k : k + x.shape[3]]
                y = y + weight[:, 0, i, j, k][:, None, None, None] * part
    return y


def channel_norm(x, state, name, eps):
    """LayerNorm over the channels of every voxel of (N, C, X, Y, Z)."""
    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    shape = (1, -1, 1, 1, 1)
    x = (x - mean) / torch.sqrt(variance + eps)
    return x * state[f"{name}.weight"].reshape(shape) + state[f"{name}.bias"].reshape(shape)


def conv(x, state, name, **options):
    return F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def gelu(x):
    """The exact one."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def stage_embed(x, state, name):
    stride = tuple(state[f"{name}.proj.weight"].shape[2:])
    return gelu(channel_norm(conv(x, state, f"{name}.proj", stride=stride), state, f"{name}.norm", 1e-5))


def conv_block(x, visible, state, name):
    """x + W2·DW5(m ⊙ (W1·LN(x))), then x + MLP(LN(x)); `visible` (N, 1, X, Y, Z) is m."""
    y = conv(channel_norm(x, state, f"{name}.norm1", 1e-5), state, f"{name}.conv1")
    y = visible * y
    y = F.conv3d(y, state[f"{name}.dwconv.weight"], state[f"{name}.dwconv.bias"], padding=2, groups=y.shape[1])
    x = x + conv(y, state, f"{name}.conv2")
    y = conv(channel_norm(x, state, f"{name}.norm2", 1e-5), state, f"{name}.mlp.fc1")
    return x + conv(gelu(y), state, f"{name}.mlp.fc2")


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def token_norm(x, state, name):
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def vit_block(x, state, name, num_heads):
    """Pre-norm transformer block on one sequence (L, D), one head after the other."""
    dim = x.shape[-1]
    width = dim // num_heads
    qkv = linear(token_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
    q, k, v = qkv[:, :dim], qkv[:, dim : 2 * dim], qkv[:, 2 * dim :]
    heads = []
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        logits = q[:, part] @ k[:, part].T / math.sqrt(width)
        attention = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
        heads.append(attention @ v[:, part])
    x = x + linear(torch.cat(heads, dim=1), state, f"{name}.attn.proj")
    hidden = gelu(linear(token_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
    return x + linear(hidden, state, f"{name}.mlp.fc2")


def token_mask_as_voxels(mask, grid, size):
    """(N, L) bool, True = masked → (N, 1, *size) 1 on visible voxels, token by token."""
    visible = torch.zeros(mask.shape[0], 1, *size, dtype=torch.float64)
    box = [size[a] // grid[a] for a in range(3)]
    for n in range(mask.shape[0]):
        for token in range(mask.shape[1]):
            at = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
            if not mask[n, token]:
                x, y, z = (slice(at[a] * box[a], (at[a] + 1) * box[a]) for a in range(3))
                visible[n, 0, x, y, z] = 1
    return visible


def encoder(x, mask, state, strides, num_heads):
    """Latent of the visible tokens in raster order, a list with one (K, D) per image, and the maps of stages 1–3.

    Args:
        x: (N, C, X, Y, Z).
        mask: (N, L) bool, True = masked.
        state: state dict of the encoder.
        strides: four triples.
        num_heads: of the transformer.
    """
    token_size = [math.prod(s[a] for s in strides) for a in range(3)]
    grid = [x.shape[2 + a] // token_size[a] for a in range(3)]
    maps, stage_sum = [], 0
    for s in range(3):
        x = stage_embed(x, state, f"stages.{s}.embed")
        visible = token_mask_as_voxels(mask, grid, x.shape[2:]).to(x.dtype)
        block = 0
        while f"stages.{s}.blocks.{block}.norm1.weight" in state:
            x = conv_block(x, visible, state, f"stages.{s}.blocks.{block}")
            block += 1
        maps.append(x)
        left = tuple(math.prod(st[a] for st in strides[s + 1 :]) for a in range(3))
        stage_sum = stage_sum + conv(x, state, f"stages.{s}.to_token", stride=left)
    tokens = stage_embed(x, state, "token_embed").flatten(2).transpose(1, 2)  # (N, L, D)
    position = sincos(grid, tokens.shape[-1]).to(x.dtype)
    latent = []
    for n in range(x.shape[0]):
        keep = [t for t in range(mask.shape[1]) if not mask[n, t]]
        sequence = (linear(tokens[n], state, "token_proj") + position)[keep]
        block = 0
        while f"vit_blocks.{block}.norm1.weight" in state:
            sequence = vit_block(sequence, state, f"vit_blocks.{block}", num_heads)
            block += 1
        sequence = sequence + stage_sum[n].flatten(1).T[keep]
        latent.append(token_norm(sequence, state, "norm"))
    return latent, maps


def decoder(latent, ids_keep, grid, state, num_heads):
    """(L, D) decoder features after the LayerNorm and (L, P) voxels, of one view.

    Args:
        latent: (K, D_encoder), in the order of `ids_keep`.
        ids_keep: raster numbers of the visible tokens.
    """
    n_tokens = grid[0] * grid[1] * grid[2]
    embedded = linear(latent, state, "embed")
    sequence = [state["mask_token"].reshape(-1)] * n_tokens
    for at, token in enumerate(ids_keep):
        sequence[int(token)] = embedded[at]
    x = torch.stack(sequence)
    x = x + sincos(grid, x.shape[-1]).to(x.dtype)
    block = 0
    while f"blocks.{block}.norm1.weight" in state:
        x = vit_block(x, state, f"blocks.{block}", num_heads)
        block += 1
    features = token_norm(x, state, "norm")
    return features, linear(features, state, "head")


def projector(x, state):
    """Linear → GELU → Linear, as the published weights have it."""
    return linear(gelu(linear(x, state, "fc1")), state, "fc2")


def conv_norm_act(x, state, name, stride=(1, 1, 1), act=True):
    """nnU-Net's convolution without bias, instance normalisation and, with `act`, LeakyReLU."""
    weight = state[f"{name}.0.weight"]
    x = F.conv3d(x, weight, stride=stride, padding=[k // 2 for k in weight.shape[2:]])
    mean = x.mean(dim=(2, 3, 4), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True)
    shape = (1, -1, 1, 1, 1)
    x = (x - mean) / torch.sqrt(variance + 1e-5)
    x = x * state[f"{name}.1.weight"].reshape(shape) + state[f"{name}.1.bias"].reshape(shape)
    return torch.where(x > 0, x, 0.01 * x) if act else x


def residual_block(x, state, name, stride=(1, 1, 1)):
    y = conv_norm_act(conv_norm_act(x, state, f"{name}.conv1", stride), state, f"{name}.conv2", act=False)
    if f"{name}.shortcut.0.weight" in state:
        x = conv_norm_act(x, state, f"{name}.shortcut", stride, act=False)
    return torch.where(x + y > 0, x + y, 0.01 * (x + y))


def masked_unet(x, mask, state, strides, num_heads):
    """Image (N, C, X, Y, Z) that the U-Net around the encoder predicts.

    Args:
        x, mask: as in `encoder`.
        state: state dict of the whole network of pretraining, with `encoder.` and `unet.`.
        strides: of full resolution, of the four stages, and of bottlenecks.
        num_heads: of the encoder's transformer.
    """
    of_encoder, unet = (
        {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        for part in ("encoder.", "unet.")
    )
    hidden = x.clone()
    token_size = [math.prod(s[a] for s in strides[:5]) for a in range(3)]
    grid = [x.shape[2 + a] // token_size[a] for a in range(3)]
    latent, maps = encoder(torch.nan_to_num(x), mask, of_encoder, strides[1:5], num_heads)
    dense = [m.clone() for m in maps]
    dense.append(x.new_zeros(x.shape[0], latent[0].shape[1], *grid))
    for n in range(x.shape[0]):
        kept = 0
        for token in range(mask.shape[1]):
            at = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])

            def box(size, at=at):
                steps = [size[a] // grid[a] for a in range(3)]
                return tuple(slice(at[a] * steps[a], (at[a] + 1) * steps[a]) for a in range(3))

            if mask[n, token]:
                hidden[(n, slice(None), *box(x.shape[2:]))] = unet["mask_voxel"].reshape(-1, 1, 1, 1)
                for s in range(4):
                    vector = unet[f"mask_vectors.{s}"].reshape(-1, 1, 1, 1)
                    dense[s][(n, slice(None), *box(dense[s].shape[2:]))] = vector
            else:
                dense[3][(n, slice(None), *at)] = latent[n][kept]
                kept += 1
    features = [residual_block(hidden, unet, "stem")]
    features += [conv_norm_act(dense[s], unet, f"skips.{s}") for s in range(4)]
    for number, stride in enumerate(strides[5:]):
        features.append(residual_block(features[-1], unet, f"bottleneck.{number}", tuple(stride)))
    y = features[-1]
    for level in reversed(range(len(features) - 1)):
        weight, bias = (unet[f"decoder.up.{level}.{name}"] for name in ("weight", "bias"))
        y = F.conv_transpose3d(y, weight, bias, stride=tuple(strides[level + 1]))
        y = torch.cat([y[(..., *map(slice, features[level].shape[2:]))], features[level]], dim=1)
        y = conv_norm_act(y, unet, f"decoder.blocks.{level}.0")
    return conv(y, unet, "decoder.heads.0")
