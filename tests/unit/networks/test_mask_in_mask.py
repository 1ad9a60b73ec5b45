"""MaskInMask: what comes out, through which projector, and where gradients stop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_mim.config import NetworkConfig
from nnunet_mim.networks.mask_in_mask import MaskedViews, MaskInMask
from nnunet_mim.networks.token_layout import tokens_from_grid
from nnunet_mim.pretraining.objective.losses import infonce_loss, reconstruction_loss
from nnunet_mim.pretraining.objective.masks import mask_of

NETWORK = NetworkConfig((3, 4, 5, 6), (1, 1, 1, 1), 2, 2.0, ((2, 2, 1), (1, 2, 2), (1, 1, 1), (1, 1, 2)), 12, 1, 2)
SIZE = (6, 8, 8)  # grid (3, 2, 2)
N_TOKENS, N_VISIBLE = 12, 5


def make(alignment="infonce", in_channels=2, n_edges=2):
    torch.manual_seed(0)
    model = MaskInMask(NETWORK, in_channels, n_edges, alignment).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def inputs(n=3, in_channels=2):
    order = torch.stack([torch.randperm(N_TOKENS) for _ in range(n)])
    images = torch.randn(n, in_channels, *SIZE, dtype=torch.float64)
    return MaskedViews(images, order[:, :N_VISIBLE], order[:, N_VISIBLE:])


def test_prediction_is_made_for_the_masked_tokens_in_their_order(reference):
    model = make()
    images, keep, masked = views = inputs()
    (output,) = model([views])
    voxels = 2 * 4 * 4 * 2
    assert output.prediction.shape == (3, N_TOKENS - N_VISIBLE, voxels)
    assert output.features.shape == (3, N_TOKENS, 12)
    latent = model.encoder(images, keep)
    for n in range(3):
        features, every = reference.network.decoder(
            latent[n], keep[n], (3, 2, 2), dict(model.decoder.named_parameters()), 2
        )
        torch.testing.assert_close(output.features[n], features, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(output.prediction[n], every[masked[n]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("edge", [0, 1])
@pytest.mark.parametrize("alignment", ["infonce", "cosine"])
def test_child_and_parent_of_an_edge(reference, alignment, edge):
    """Child: mean of all tokens, projected. Parent: projected for infonce, raw for cosine; never a way back."""
    model = make(alignment)
    parents = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    (output,) = model([inputs()])
    child, parent = model.align(output.features, edge, parents)

    def projected(x, side):
        prefix = f"projectors.{side}.{edge}."
        state = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
        return reference.network.projector(x, state)

    mean = sum(output.features[:, t] for t in range(N_TOKENS)) / N_TOKENS
    torch.testing.assert_close(child, projected(mean, "child"), rtol=1e-9, atol=1e-9)
    if alignment == "cosine":
        assert torch.equal(parent, parents)
        assert not parent.requires_grad
    else:
        torch.testing.assert_close(parent, projected(parents, "parent"), rtol=1e-9, atol=1e-9)
    (child.sum() + parent.sum()).backward()
    assert parents.grad is None
    sides = ("child",) if alignment == "cosine" else ("child", "parent")
    for name, parameter in model.named_parameters():
        if name.startswith("projectors."):
            used = name.startswith(tuple(f"projectors.{side}.{edge}." for side in sides))
            assert (parameter.grad is not None) == used, name
        elif name.startswith("encoder."):
            assert parameter.grad is not None, name


def test_without_alignment_there_are_no_projectors():
    model = make("none")
    parents = torch.randn(7, 12, dtype=torch.float64)
    assert model.align(model([inputs()])[0].features, 0, parents) == (None, None)
    assert not any("projectors" in key for key in model.state_dict())


def test_cosine_has_no_projector_on_the_parent_side():
    assert {key.split(".")[1] for key in make("cosine").state_dict() if key.startswith("projectors.")} == {"child"}


@pytest.mark.parametrize("n_edges", [0, 1, 2])
def test_one_pair_of_projectors_per_edge(n_edges):
    keys = {tuple(key.split(".")[1:3]) for key in make(n_edges=n_edges).state_dict() if key.startswith("projectors.")}
    assert keys == {(side, str(edge)) for side in ("child", "parent") for edge in range(n_edges)}


def test_state_dict_prefixes():
    assert {key.split(".")[0] for key in make().state_dict()} == {"encoder", "decoder", "projectors"}


def test_masked_voxels_reach_nothing_but_the_target():
    model = make()
    images, keep, masked = views = inputs(1)
    changed = images.clone()
    number = int(masked[0, 0])
    x, y, z = (number // 4) * 2, number // 2 % 2 * 4, number % 2 * 4
    changed[0, :, x : x + 2, y : y + 4, z : z + 4] = torch.nan
    (before,), (after,) = model([views]), model([MaskedViews(changed, keep, masked)])
    assert torch.equal(before.prediction, after.prediction)
    assert torch.equal(before.features, after.features)


@pytest.mark.parametrize("recompute", [False, True])
def test_groups_of_views_with_other_numbers_of_visible_tokens_do_not_see_each_other(recompute):
    model, groups = make(), []
    for n, n_visible in ((3, 5), (1, 1), (2, 9)):
        order = torch.stack([torch.randperm(N_TOKENS) for _ in range(n)])
        images = torch.randn(n, 2, *SIZE, dtype=torch.float64)
        groups.append(MaskedViews(images, order[:, :n_visible], order[:, n_visible:]))

    def gradients(outputs):
        model.zero_grad()
        sum(part.square().mean() for output in outputs for part in output).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together = model(groups, recompute)
    alone = [output for group in groups for output in model([group])]
    for found, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(together), gradients(alone), rtol=1e-9, atol=1e-12)


@st.composite
def levels(draw):
    """A small random network, its views' grid, and the number of visible tokens."""
    strides = tuple(draw(st.tuples(*[st.tuples(*[st.sampled_from([1, 2])] * 3)] * 4)))
    dims = (*draw(st.tuples(*[st.integers(3, 6)] * 3)), draw(st.sampled_from([6, 12])))
    depths, heads = draw(st.tuples(*[st.integers(1, 2)] * 4)), draw(st.integers(1, 3))
    network = NetworkConfig(dims, depths, heads, 2.0, strides, 12, 1, 2)
    largest = 2 if math.prod(network.token_size) > 256 else 3
    grid = draw(st.tuples(*[st.integers(1, largest)] * 3).filter(lambda g: math.prod(g) > 1))
    n_visible = draw(st.integers(1, math.prod(grid) - 1))
    return network, draw(st.integers(1, 3)), grid, n_visible, draw(st.integers(0, 2**31 - 1))


def compare_level_with_dense(encode_dense, network, in_channels, grid, n_visible, seed, dtype, relative):
    """Loss of one level (reconstruction and alignment) and the gradient of every parameter, both ways to run it."""
    torch.manual_seed(seed)
    model = MaskInMask(network, in_channels)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(dtype)
    images = torch.randn(2, in_channels, *(g * p for g, p in zip(grid, network.token_size, strict=True)), dtype=dtype)
    keep, masked = torch.rand(2, math.prod(grid)).argsort(dim=1).tensor_split([n_visible], dim=1)
    keep, masked = keep.sort(dim=1).values, masked.sort(dim=1).values
    rows = torch.arange(2)[:, None]
    tokens = tokens_from_grid(images.permute(0, 2, 3, 4, 1), network.token_size)[rows, masked].flatten(2)
    parents = torch.randn(5, 12, dtype=dtype)

    def loss_and_gradients(prediction, child, parent):
        loss = reconstruction_loss(prediction, tokens, torch.ones_like(masked, dtype=torch.bool))
        loss = loss + 0.1 * infonce_loss(child, parent, torch.tensor([3, 1]), torch.ones(2, dtype=dtype), 0.2)[0]
        model.zero_grad()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (output,) = model([MaskedViews(images, keep, masked)])
    found, found_gradients = loss_and_gradients(output.prediction, *model.align(output.features, 0, parents))
    latent = encode_dense(model.encoder, images, mask_of(masked, math.prod(grid)))
    features = model.decoder(latent, keep, grid)
    prediction = model.decoder.head(features)[rows, masked]
    wanted, gradients = loss_and_gradients(prediction, *model.align(features, 0, parents))

    assert abs(found - wanted) <= relative * abs(wanted)
    assert found_gradients.keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        bound = relative * max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((found_gradients[name] - gradient).abs().max()) <= bound, name


@given(level=levels())
@settings(max_examples=30)
def test_loss_and_gradients_equal_the_dense_computation(encode_dense, level):
    compare_level_with_dense(encode_dense, *level, torch.float64, 1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("strides", [((2, 2, 2),) * 4, ((1, 2, 2), (2, 1, 2), (1, 2, 1), (2, 2, 1))])
def test_loss_and_gradients_equal_the_dense_computation_in_float32(encode_dense, strides, seed):
    network = NetworkConfig((8, 10, 12, 12), (1, 2, 1, 2), 2, 2.0, strides, 12, 2, 2)
    compare_level_with_dense(encode_dense, network, 2, (2, 3, 2), 5, seed, torch.float32, 1e-4)
