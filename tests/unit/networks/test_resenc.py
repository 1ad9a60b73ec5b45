"""nnU-Net's residual encoder U-Net as a pretraining network, against nnU-Net's own network and slow twins."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_mim.checkpoint.format import PretrainedCheckpoint, build_checkpoint, save_atomically
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.mask_in_mask import MaskedViews
from nnunet_mim.networks.resenc import ResEncMaskInMask, check_resenc, check_view, fitting_view
from nnunet_mim.pretraining.configure import config_for_data

TOKEN = (8, 8, 8)


def architecture(strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)), features=(4, 6, 8, 10)):
    n = len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": n, "features_per_stage": list(features), "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * n, "strides": [list(s) for s in strides], "n_blocks_per_stage": [1] * n,
            "n_conv_per_stage_decoder": [1] * (n - 1), "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ResEncMaskInMask(architecture(), TOKEN, in_channels=2)


def views():
    torch.manual_seed(1)
    images = torch.randn(2, 2, 16, 16, 32)
    order = torch.rand(2, 16).argsort(dim=1)
    return images, order[:, :7].sort(dim=1).values, order[:, 7:].sort(dim=1).values


def hidden_by_hand(images, ids_masked):
    images = images.clone()
    for n, ids in enumerate(ids_masked.tolist()):
        for i in ids:
            x, y, z = i // 8 * 8, i // 4 % 2 * 8, i % 4 * 8
            images[n, :, x : x + 8, y : y + 8, z : z + 8] = 0
    return images


def test_masked_voxels_are_hidden_and_change_nothing(model):
    images, keep, masked = views()
    assert torch.equal(model.hide(images, masked), hidden_by_hand(images, masked))
    other = torch.where(hidden_by_hand(torch.ones_like(images), masked) == 1, images, torch.randn_like(images))
    first, second = (model([MaskedViews(x, keep, masked)])[0] for x in (images, other))
    assert torch.equal(first.prediction, second.prediction)
    assert torch.equal(first.features, second.features)


def test_it_is_nnunets_network(model):
    """The same weights in nnU-Net's own network: its output at the masked tokens, voxel by voxel."""
    block, (images, keep, masked) = architecture(), views()
    stock = get_network_from_plans(
        block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"], 2, 2, deep_supervision=False
    )
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("projectors")}
    stock.load_state_dict(weights)  # strict: every key and no other
    expected = stock(hidden_by_hand(images, masked))
    prediction = model([MaskedViews(images, keep, masked)])[0].prediction
    for n, ids in enumerate(masked.tolist()):
        for row, i in enumerate(ids):
            x, y, z = i // 8 * 8, i // 4 % 2 * 8, i % 4 * 8
            token = expected[n, :, x : x + 8, y : y + 8, z : z + 8]
            assert torch.allclose(prediction[n, row], token.permute(1, 2, 3, 0).flatten(), atol=1e-5)


def test_groups_of_views_do_not_see_each_other(model):
    groups = [MaskedViews(*(part[rows] for part in views())) for rows in (slice(0, 1), slice(1, None))]
    for found, group in zip(model(groups), groups, strict=True):
        torch.testing.assert_close(found, model([group])[0])


def test_features_of_tokens(model):
    """Stride 8 is that of the last stage: a map voxel a token."""
    images, keep, masked = views()
    skips = model.encoder(hidden_by_hand(images, masked))
    features = model([MaskedViews(images, keep, masked)])[0].features
    assert torch.allclose(features, skips[3].flatten(2).transpose(1, 2))
    visible = model.visible_features(images, keep, masked)
    assert torch.equal(visible[1, 3], features[1, keep[1, 3]])
    coarse = ResEncMaskInMask(architecture(((1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 2, 2))), (4, 8, 16))
    assert coarse.feature_stage == 3
    (output,) = coarse([MaskedViews(torch.randn(1, 1, 16, 16, 32), keep[:1, :1], masked[:1, :1])])
    assert output.features.shape == (1, 16, 10)


def test_maps_for_the_probe_cover_the_image(model):
    deeper = ResEncMaskInMask(architecture(((1, 1, 1), *[(2, 2, 2)] * 4), (4, 6, 8, 10, 12)), TOKEN)
    maps = deeper.feature_source.forward_features(torch.randn(1, 1, 24, 16, 40))  # no multiple of 16
    assert [tuple(m.shape[1:]) for m in maps] == [(6, 12, 8, 20), (8, 6, 4, 10), (10, 3, 2, 5)]
    image = torch.randn(1, 1, 16, 32, 16)
    for found, expected in zip(deeper.forward_features(image), deeper.encoder(image)[1:4], strict=True):
        assert torch.equal(found, expected)


def test_gradients_reach_every_weight(model):
    images, keep, masked = views()
    (output,) = model([MaskedViews(images, keep, masked)])
    child, parent = model.align(output.features, 0, torch.randn(16, 10))
    (output.prediction.square().mean() + child.square().mean() + parent.square().mean()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in without} <= {"projectors", "decoder"}
    assert all(".1." in name or "seg_layers" in name for name in without)  # the other edge; heads of lower levels


def test_other_networks_and_views_are_refused():
    with pytest.raises(MiMError, match="the plans name PlainConvUNet, not ResidualEncoderUNet"):
        check_resenc({"network_class_name": "x.y.PlainConvUNet"})
    with pytest.raises(MiMError, match=r"--view \(96, 96, 20\) must be a multiple of \(8, 8, 8\)"):
        check_view(architecture(), (96, 96, 20))
    check_view(architecture(), (96, 96, 24))
    with pytest.raises(MiMError, match=r"--view \(8, 8, 8\) must be a multiple of \(8, 8, 8\), .* and larger"):
        check_view(architecture(), (8, 8, 8))


@pytest.mark.parametrize(
    ("deepest", "view", "fits"),
    [
        ((32, 32, 32), (96, 96, 96), (96, 96, 96)),
        ((64, 64, 64), (96, 96, 96), (128, 64, 64)),  # its norms need two voxels in the deepest stage
        ((32, 64, 64), (48, 96, 96), (64, 64, 64)),
        ((32, 64, 64), (48, 96, 160), (32, 64, 128)),
        ((32, 32, 32), (32, 32, 32), (64, 32, 32)),
        ((8, 8, 8), (96, 64, 32), (96, 64, 32)),
    ],
)
def test_a_view_that_is_chosen_fits(deepest, view, fits):
    plans = architecture(strides=((1, 1, 1), deepest), features=(4, 6))
    assert fitting_view(plans, view, (16, 16, 16)) == fits
    check_view(plans, fits)
    plans["arch_kwargs"]["features_per_stage"] = [2, 2]
    tokens = torch.arange(math.prod(fits) // 16**3)[None]
    keep, masked = tokens[:, 1:], tokens[:, :1]
    (output,) = ResEncMaskInMask(plans, (16, 16, 16))([MaskedViews(torch.randn(1, 1, *fits), keep, masked)])
    assert output.prediction.isfinite().all()


def test_the_default_view_of_a_run_fits():
    """Head-and-neck CT in voxels of 1 mm, and plans that halve six times: 96 voxels would suit the data alone."""
    deep = architecture(strides=((1, 1, 1), *[(2, 2, 2)] * 6), features=[4] * 7)
    source = SimpleNamespace(spacing=(1.0, 1.0, 1.0), in_channels=1)
    shapes = np.array([(300, 300, 300)] * 3)
    settings = {"preset": "tiny", "encoder": "resenc", "architecture": deep}
    assert config_for_data({"preset": "tiny"}, source, shapes).view_size == (96, 96, 96)
    assert config_for_data(settings, source, shapes).view_size == (128, 64, 64)
    assert config_for_data({**settings, "view_size": (128, 128, 128)}, source, shapes).view_size == (128, 128, 128)


def test_settings_survive_a_checkpoint():
    config = PretrainConfig(preset="tiny", view_size=(32, 32, 32), encoder="resenc", architecture=architecture())
    again = PretrainConfig.from_dict(config.to_dict())
    assert again == config
    assert isinstance(build_network(again), ResEncMaskInMask)


def test_a_checkpoint_keeps_the_contract_of_nnunets_finetuning(tmp_path, reference):
    config = PretrainConfig(preset="tiny", view_size=(32, 32, 32), encoder="resenc", architecture=architecture())
    model = build_network(config)
    provenance = {
        "plans_name": "P", "datasets": ["Dataset001_X"], "configuration": "3d_fullres", "spacing": [1, 1, 1],
        "normalization": ["CTNormalization"],
    }  # fmt: skip
    save_atomically(build_checkpoint(model.state_dict(), config, provenance), tmp_path / "checkpoint_final.pth")
    network = reference.contract.load_by_contract(tmp_path / "checkpoint_final.pth", num_classes=5)
    assert reference.contract.pretrain_info_of(tmp_path / "checkpoint_final.pth") == {
        "checkpoint_path": str(tmp_path / "checkpoint_final.pth"), "pt_num_in_channels": 1,
        "pt_used_patchsize": [32, 32, 32], "key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"], "key_to_lpe": None,
    }  # fmt: skip
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(network.encoder.state_dict()[name], value)
    with pytest.raises(MiMError, match=r"residual encoder U-Net.*nnUNetv2_train .* -pretrained_weights"):
        PretrainedCheckpoint.load(tmp_path / "checkpoint_final.pth")


@pytest.mark.parametrize("argument", ["nonlin", "conv_op", "norm_op", "dropout_op"])
def test_nothing_else_that_plans_name_is_run(tmp_path, argument):
    """nnU-Net's builder calls what stands there: the canary shows that ours does not."""
    canary = tmp_path / "canary"
    command = {"args": f"touch {canary}", "shell": True}
    block = architecture()
    block["arch_kwargs"] |= {argument: "subprocess.check_output", f"{argument}_kwargs": command}
    with pytest.raises(MiMError, match="nothing was run"):
        ResEncMaskInMask(block, TOKEN)
    assert not canary.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"network_class_name": "somewhere.else.ResidualEncoderUNet"},
        {"_kw_requires_import": ["conv_op", "n_stages"]},
        {"arch_kwargs": {**architecture()["arch_kwargs"], "block": "os.system"}},
        {"arch_kwargs": {**architecture()["arch_kwargs"], "nonlin": ["torch.nn.LeakyReLU"]}},
    ],
)
def test_names_that_are_no_part_of_the_network_are_refused(change):
    with pytest.raises(MiMError, match="nothing was run"):
        ResEncMaskInMask(architecture() | change, TOKEN)
