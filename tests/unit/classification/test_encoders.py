import json

import numpy as np
import pytest
import torch

from nnunet_mim.classification.encoders import load_encoder, rebuilt_encoder, with_mask_channel
from nnunet_mim.classification.features import FeatureExtractor
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.regions import CaseVoxels
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.hybrid_encoder import HybridEncoder


def outputs(module, size=(16, 16, 32)):
    with torch.no_grad():
        image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
        return module.eval().forward_features(image)


def assert_rebuilt(loaded):
    """The architecture in settings.json and the weights make the same encoder."""
    again = rebuilt_encoder(json.loads(json.dumps(loaded.architecture)))
    again.load_state_dict(loaded.module.state_dict())
    for a, b in zip(outputs(again), outputs(loaded.module), strict=True):
        torch.testing.assert_close(a, b)
    assert tuple(features.shape[1] for features in outputs(loaded.module)) == loaded.dims


def test_random_weights_depend_on_the_seed_alone(source):
    config = ClassifyConfig(checkpoint="none")
    torch.manual_seed(1)
    first = load_encoder(source, config, "all")
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # the generator of everything else is left alone
    assert load_encoder(source, config, 0).sha256 == first.sha256
    assert load_encoder(source, ClassifyConfig(checkpoint="none", seed=1), "all").sha256 != first.sha256
    assert first.module.config.embed_dims == (6, 6, 12, 12)  # of the plans
    assert first.origin == "random weights"
    assert_rebuilt(first)


def test_a_pretrained_encoder(source, make_checkpoint, network_config):
    path, encoder = make_checkpoint()
    loaded = load_encoder(source, ClassifyConfig(checkpoint=str(path)), "all")
    for a, b in zip(outputs(loaded.module), outputs(encoder), strict=True):
        torch.testing.assert_close(a, b)
    assert loaded.origin == str(path)
    assert not loaded.notes
    assert_rebuilt(loaded)


def test_other_units_are_noted(source, make_checkpoint):
    path, _ = make_checkpoint(provenance={"spacing": [2.0, 2.0, 2.0], "transpose_forward": [0, 1, 2]})
    (note,) = load_encoder(source, ClassifyConfig(checkpoint=str(path)), "all").notes
    assert "order of axes: pretrained with [0, 1, 2], now [1, 0, 2]" in note


def test_the_checkpoint_of_the_finished_pretraining_is_found(source, folders, make_checkpoint):
    with pytest.raises(MiMError, match=r"mim_pretrain -d 007 .*-pc none takes random weights"):
        load_encoder(source, ClassifyConfig(), "all")
    run = folders.results / "MiMPretrain__nnUNetPlans__3d_fullres"
    path, _ = make_checkpoint(run / "fold_all" / "checkpoint_final.pth")
    assert load_encoder(source, ClassifyConfig(), "all").origin == str(path)
    left_out, _ = make_checkpoint(run / "fold_1" / "checkpoint_final.pth", seed=4)
    assert load_encoder(source, ClassifyConfig(), 1).origin == str(left_out)
    assert load_encoder(source, ClassifyConfig(), 2).origin == str(path)


ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "arch_kwargs": {
        "n_stages": 6,
        "features_per_stage": [4, 6, 8, 10, 12, 12],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
        "n_blocks_per_stage": [1] * 6,
        "n_conv_per_stage_decoder": [1] * 5,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


@pytest.fixture
def resenc_source(source):
    source.plans["configurations"]["3d_fullres"]["architecture"] = ARCHITECTURE
    return source


def test_the_residual_encoder(resenc_source, tmp_path, make_checkpoint):
    random = load_encoder(resenc_source, ClassifyConfig(encoder="resenc", checkpoint="none"), "all")
    assert random.cell == (16, 16, 32)
    assert_rebuilt(random)
    tiny = CaseVoxels("tiny", np.ones((1, 3, 9, 5), np.float32), None, (2.0, 2.0, 2.0), {})
    features = FeatureExtractor(random, ClassifyConfig(encoder="resenc", checkpoint="none")).of_case(tiny)
    assert features.shape == (2 * (6 + 8 + 10 + 12),)  # down to the stage of a token
    assert np.isfinite(features).all()

    path, _ = make_checkpoint()
    stored = torch.load(path, weights_only=True)
    stored["mim_config"].update(encoder="resenc", architecture=ARCHITECTURE)
    torch.manual_seed(0)
    network = build_network(PretrainConfig.from_dict(stored["mim_config"])).eval()
    stored["network_weights"] = network.state_dict()
    torch.save(stored, path)
    config = ClassifyConfig(encoder="resenc", checkpoint=str(path))
    loaded = load_encoder(resenc_source, config, "all")
    for a, b in zip(outputs(loaded.module, (32, 32, 64)), outputs(network, (32, 32, 64)), strict=True):
        torch.testing.assert_close(a, b)
    assert_rebuilt(loaded)
    with pytest.raises(MiMError, match="not the encoder of nnUNetTrainerMiM"):
        load_encoder(resenc_source, ClassifyConfig(checkpoint=str(path)), "all")

    stored["mim_config"]["seed"] = -1
    torch.save(stored, path)
    with pytest.raises(MiMError, match=rf"{path}, mim_config: --seed must be 0 or more, got -1"):
        load_encoder(resenc_source, config, "all")


@pytest.mark.parametrize("encoder", ["hybrid", "resenc"])
def test_a_mask_channel_changes_nothing_at_first(source, encoder):
    if encoder == "resenc":
        source.plans["configurations"]["3d_fullres"]["architecture"] = ARCHITECTURE
    loaded = load_encoder(source, ClassifyConfig(encoder=encoder, checkpoint="none"), "all")
    wider = with_mask_channel(loaded)
    image = torch.randn(1, 1, 32, 32, 64)
    with torch.no_grad():
        before = loaded.module.forward_features(image)
        after = wider.module.forward_features(torch.cat([image, torch.rand_like(image)], dim=1))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)
    again = rebuilt_encoder(json.loads(json.dumps(wider.architecture)))
    again.load_state_dict(wider.module.state_dict())


def test_a_hybrid_checkpoint_is_no_residual_encoder(source, make_checkpoint):
    path, _ = make_checkpoint()
    with pytest.raises(MiMError, match="leave out --encoder resenc"):
        load_encoder(source, ClassifyConfig(encoder="resenc", checkpoint=str(path)), "all")
    assert isinstance(load_encoder(source, ClassifyConfig(checkpoint=str(path)), "all").module, HybridEncoder)
