"""The reconstruction loss of the U-Net around the encoder, on the views that it sees."""

from dataclasses import replace

import torch

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.geometry import levels_of
from nnunet_mim.networks.build import build_network
from nnunet_mim.pretraining.objective.levels import unet_losses, unet_views
from nnunet_mim.pretraining.objective.views import nested_views

NETWORK = NetworkConfig((3, 4, 3, 6), (1, 1, 1, 1), 2, 2.0, ((2, 1, 1), (1, 2, 1), (1, 1, 1), (1, 1, 2)), 12, 1, 2)
PUBLISHED = PretrainConfig(
    network=NETWORK, view_size=(4, 8, 4), in_channels=2, n_children=(3, 2), alignment_weight=0.7, temperature=0.5,
    level_weights=(1.0, 0.5, 2.0),
)  # fmt: skip
SKIPPED = replace(PUBLISHED, scale=(1, 1, 1))
THRESHOLD = torch.tensor([0.3, 0.3], dtype=torch.float64)
UNET = replace(PUBLISHED, decoder="unet", unet_views=(1, 2, 0), unet_weight=0.5)


def make_crops(config, seed=1):
    """Two crops with quiet parts (air); most of the second lies outside the volume."""
    fov = levels_of(config)[0].fov
    torch.manual_seed(seed)
    crops = torch.randn(2, config.in_channels, *fov, dtype=torch.float64)
    crops[:, :, : fov[0] // 2, : fov[1] // 4] *= 0.01
    valid = torch.tensor([[[0, n] for n in fov], [[0, fov[0]], [fov[1] - 3, fov[1]], [0, fov[2] // 2 + 1]]])
    return crops, valid


def make_views(config, crops=None, seed=1):
    own, valid = make_crops(config)
    fill = torch.tensor([-4.0, -2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    crops = own if crops is None else crops
    return nested_views(crops, valid, fill, levels_of(config), generator, THRESHOLD)  # children prefer tissue: default


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def unet_model(config=UNET):
    torch.manual_seed(0)
    return build_network(config).double()


def test_loss_of_the_unet_is_the_mean_over_the_target_tokens_of_its_views(reference):
    """Here of the first view of level 1 and the first two of level 2 of each crop, one token after the other."""
    model, views = unet_model(), make_views(UNET)
    ((loss, by_level),) = unet_losses(model, views, THRESHOLD, UNET)
    assert list(by_level) == [1, 2]
    for number, rows in ((1, [0, 1]), (2, [0, 1, 3, 4])):
        view = views[number - 1]
        assert view.crop[rows].tolist() == sorted([0, 1] * (len(rows) // 2))
        predictions, tokens, is_target = [], [], []
        for n in rows:
            hidden = view.ids_masked[n].tolist()
            (prediction,) = model.reconstruct_with_unet([view.masked(slice(n, n + 1))])
            own = [reference.geometry.token_voxels(view.images[n], UNET.network.token_size, t) for t in hidden]
            predictions.append(list(prediction[0]))
            tokens.append([torch.stack(v) for v in own])
            flat = [reference.losses.is_flat(v, THRESHOLD.tolist()) for v in own]
            is_target.append([not view.padded[n, t] and not f for t, f in zip(hidden, flat, strict=True)])
        assert any(map(any, is_target))
        assert not all(map(all, is_target))
        wanted = reference.losses.reconstruction(predictions, tokens, is_target)
        torch.testing.assert_close(by_level[number], torch.as_tensor(wanted), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, 0.5 * sum(by_level.values()))


def test_passes_of_the_unet_add_up():
    views, results = make_views(UNET), []
    for views_per_pass in (None, 3, 1):
        model, total = unet_model(), {}
        for loss, by_level in unet_losses(model, views, THRESHOLD, UNET, views_per_pass):
            loss.backward()
            for number, share in by_level.items():
                total[number] = total.get(number, 0) + share
        results.append({**{f"loss {n}": share for n, share in total.items()}, **gradients(model)})
    for other in results[1:]:
        assert list(other) == list(results[0])
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_without_an_outer_level_the_unet_sees_the_same_numbers_of_levels():
    config = replace(SKIPPED, decoder="unet", unet_views=(1, 1, 1))
    views = make_views(config)
    assert [number for number, _ in unet_views(views, config)] == [4 - len(views) + at for at in range(len(views))]
    assert len(views) < 3
