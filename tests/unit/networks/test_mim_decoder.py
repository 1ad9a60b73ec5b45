"""MiMDecoder against a twin in plain functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_mim.config import PRESETS, NetworkConfig
from nnunet_mim.networks.mim_decoder import MiMDecoder


def make(dim=12, depth=2, num_heads=2, seed=0):
    """For a latent of width 6 and tokens of one voxel with 7 channels."""
    torch.manual_seed(seed)
    network = NetworkConfig((1, 1, 1, 6), (1, 1, 1, 1), 1, 2.0, ((1, 1, 1),) * 4, dim, depth, num_heads)
    decoder = MiMDecoder(7, network).double()
    for parameter in decoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return decoder


@given(
    data=st.data(),
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    shape=st.sampled_from([(6, 1, 1), (12, 2, 3), (12, 1, 2), (18, 1, 3)]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=25)
def test_features_and_voxels_match_the_twin(reference, data, grid, shape, seed):
    dim, depth, num_heads = shape
    decoder = make(dim, depth, num_heads, seed=seed)
    n_tokens = math.prod(grid)
    n_visible = data.draw(st.integers(1, n_tokens))
    ids_keep = torch.stack([torch.randperm(n_tokens)[:n_visible] for _ in range(3)])  # any order
    latent = torch.randn(3, n_visible, 6, dtype=torch.float64)
    with torch.no_grad():
        features = decoder(latent, ids_keep, grid)
        voxels = decoder.head(features)
        for n in range(3):
            wanted = reference.network.decoder(latent[n], ids_keep[n], grid, decoder.state_dict(), num_heads)
            torch.testing.assert_close(features[n], wanted[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(voxels[n], wanted[1], rtol=1e-9, atol=1e-9)


def test_gradients_match_the_twin(reference):
    decoder, grid = make(), (2, 3, 2)
    ids_keep = torch.tensor([[0, 5, 7, 11]])
    latent = torch.randn(1, 4, 6, dtype=torch.float64)
    weight = torch.randn(1, 12, 7, dtype=torch.float64)
    parameters = dict(decoder.named_parameters())
    found = torch.autograd.grad(
        (decoder.head(decoder(latent, ids_keep, grid)) * weight).sum(), list(parameters.values())
    )
    _, voxels = reference.network.decoder(latent[0], ids_keep[0], grid, parameters, 2)
    wanted = torch.autograd.grad((voxels[None] * weight).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=name)
    assert found[list(parameters).index("mask_token")].abs().max() > 0


def test_order_of_the_visible_tokens_does_not_matter():
    decoder, grid = make(), (2, 2, 2)
    ids_keep, latent = torch.tensor([[1, 3, 6]]), torch.randn(1, 3, 6, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(decoder(latent[:, order], ids_keep[:, order], grid), decoder(latent, ids_keep, grid))


def test_masked_tokens_differ_only_by_position():
    """Without blocks, positions in mind: a masked token is the mask token plus its position, normalised."""
    decoder, grid = make(depth=0), (1, 1, 4)
    features = decoder(torch.randn(1, 1, 6, dtype=torch.float64), torch.tensor([[2]]), grid)
    from_other_latent = decoder(torch.randn(1, 1, 6, dtype=torch.float64), torch.tensor([[2]]), grid)
    assert torch.equal(features[:, [0, 1, 3]], from_other_latent[:, [0, 1, 3]])
    assert not torch.equal(features[:, 2], from_other_latent[:, 2])


@pytest.mark.parametrize("key", ["mask_token", "embed.weight", "norm.weight", "head.weight"])
def test_parameter_shapes(key):
    wanted = {"mask_token": (1, 1, 12), "embed.weight": (12, 6), "norm.weight": (12,), "head.weight": (7, 12)}
    assert tuple(make().state_dict()[key].shape) == wanted[key]


def test_a_new_decoder_tells_masked_from_visible():
    """The mask token is not left at zero."""
    torch.manual_seed(0)
    assert MiMDecoder(1, PRESETS["tiny"]).mask_token.std() > 0.005
