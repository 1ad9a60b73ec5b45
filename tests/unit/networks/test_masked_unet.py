"""The U-Net of finetuning in pretraining: equal to a dense twin, and blind to masked voxels."""

import pytest
import torch

from nnunet_mim.config import NetworkConfig
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.networks.mask_in_mask import MaskedViews, MaskInMask
from nnunet_mim.pretraining.objective.masks import mask_of

CUBES = NetworkConfig((3, 4, 5, 6), (1, 1, 1, 1), 2, 2.0, ((2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1)), 12, 1, 2)
THICK = NetworkConfig((3, 4, 5, 6), (1, 1, 1, 2), 2, 2.0, ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 2)), 12, 1, 2)
CASES = {"bottleneck": (CUBES, (8, 8, 16)), "thick slices, no bottleneck": (THICK, (4, 4, 8))}


def make(network, size, in_channels=2):
    torch.manual_seed(0)
    architecture = plans_architecture(network, size)["arch_kwargs"]
    model = MaskInMask(network, in_channels, unet=architecture).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model, architecture


def groups_of(network, size, counts=((2, 3), (1, 5))):
    """Groups of views with another number of visible tokens each: (views, visible tokens)."""
    n_tokens = torch.tensor(size).prod().item() // torch.tensor(network.token_size).prod().item()
    groups = []
    for n, n_visible in counts:
        order = torch.stack([torch.randperm(n_tokens) for _ in range(n)])
        images = torch.randn(n, 2, *size, dtype=torch.float64)
        groups.append(MaskedViews(images, order[:, :n_visible].sort().values, order[:, n_visible:]))
    return groups


@pytest.mark.parametrize("case", CASES)
def test_predictions_equal_a_dense_twin_in_loops(reference, case):
    network, size = CASES[case]
    model, architecture = make(network, size)
    assert len(architecture["strides"]) == (6 if case == "bottleneck" else 5)
    groups = groups_of(network, size)
    for group, prediction in zip(groups, model.reconstruct_with_unet(groups), strict=True):
        n_tokens = group.ids_keep.shape[1] + group.ids_masked.shape[1]
        mask = mask_of(group.ids_masked, n_tokens)
        image = reference.network.masked_unet(group.images, mask, model.state_dict(), architecture["strides"], 2)
        for n, own in enumerate(prediction):
            for token, voxels in zip(group.ids_masked[n].tolist(), own, strict=True):
                wanted = reference.geometry.token_voxels(image[n], network.token_size, token)
                torch.testing.assert_close(voxels, torch.stack(wanted).flatten(), rtol=1e-8, atol=1e-8)


def test_masked_voxels_change_nothing():
    """NaN in every masked voxel leaves predictions and gradients as they are, bit for bit."""
    network, size = CASES["bottleneck"]
    model, _ = make(network, size)
    results = []
    for poisoned in (False, True):
        torch.manual_seed(1)
        groups = groups_of(network, size)
        for images, _, ids_masked in groups if poisoned else ():
            _, gy, gz = (n // p for n, p in zip(size, network.token_size, strict=True))
            X, Y, Z = network.token_size
            for n, token in ((n, int(token)) for n, ids in enumerate(ids_masked) for token in ids):
                x, y, z = token // (gy * gz) * X, token // gz % gy * Y, token % gz * Z
                images[n, :, x : x + X, y : y + Y, z : z + Z] = torch.nan
        model.zero_grad()
        predictions = model.reconstruct_with_unet(groups)
        sum(p.square().sum() for p in predictions).backward()
        assert any(images.isnan().any() for images, _, _ in groups) == poisoned
        results.append([*predictions, *(p.grad for p in model.parameters() if p.grad is not None)])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_all_of_encoder_and_unet_learn_and_nothing_else():
    network, size = CASES["bottleneck"]
    model, _ = make(network, size)
    groups = groups_of(network, size)
    sum(p.square().sum() for p in model.reconstruct_with_unet(groups)).backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(name.startswith(("encoder.", "unet.")) for name in learning)
    assert learning == {name for name, _ in model.named_parameters() if name.startswith(("encoder.", "unet."))}


def test_names_and_shapes_are_those_of_the_network_of_finetuning():
    network, size = CASES["bottleneck"]
    model, architecture = make(network, size)
    finetuned = HybridUNet(2, 2, **architecture).state_dict()
    own = {k.removeprefix("unet."): v.shape for k, v in model.state_dict().items() if k.startswith("unet.")}
    own = {k: shape for k, shape in own.items() if not k.startswith("mask_")}
    others = ("encoder.", *(f"decoder.heads.{n}." for n in range(1, 5)))
    assert own == {k: v.shape for k, v in finetuned.items() if not k.startswith(others)}


def test_a_unet_changes_no_other_initial_weight():
    torch.manual_seed(3)
    alone = MaskInMask(CUBES).state_dict()
    torch.manual_seed(3)
    both = MaskInMask(CUBES, unet=plans_architecture(CUBES, (8, 8, 16))["arch_kwargs"]).state_dict()
    assert {name.split(".")[0] for name in set(both) - set(alone)} == {"unet"}
    assert all(torch.equal(both[name], value) for name, value in alone.items())
