"""Transfer of a U-Net that learnt in pretraining: all but the heads arrives where it fits, and the report says so."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nnunet_mim.checkpoint.format import PretrainedCheckpoint, build_checkpoint, save_atomically
from nnunet_mim.config import PretrainConfig
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.trainers.transfer import transfer_weights

PROVENANCE = {
    "datasets": [], "plans_name": "", "configuration": "3d_fullres", "spacing": [2.0] * 3, "normalization": []
}  # fmt: skip


@pytest.fixture
def pretrained(tmp_path, network_config):
    """pretrained(view, channels) → (network of pretraining, PretrainedCheckpoint of a file of it)."""

    def make(view=(64, 64, 64), channels=1):
        network = replace(network_config, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
        config = PretrainConfig(network=network, view_size=view, in_channels=channels, decoder="unet")
        torch.manual_seed(5)
        model = build_network(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        path = tmp_path / "checkpoint_final.pth"
        save_atomically(build_checkpoint(model.state_dict(), config, PROVENANCE), path)
        return model, PretrainedCheckpoint.load(path)

    return make


def finetuned(network, patch=(64, 64, 64), channels=1, **kwargs):
    torch.manual_seed(11)
    return HybridUNet(channels, 3, True, **{**plans_architecture(network, patch)["arch_kwargs"], **kwargs})


def test_the_transferred_network_computes_what_it_computed_in_pretraining(pretrained, network_config):
    """With nothing masked, and with pretraining's head in place of its own."""
    model, checkpoint = pretrained()
    network = finetuned(network_config)
    report = transfer_weights(network, checkpoint)
    x = torch.randn(1, 1, 64, 64, 64)
    n_tokens = (64 // 16) ** 3
    ids, none = torch.arange(n_tokens)[None], torch.zeros(1, 0, dtype=torch.int64)
    with torch.no_grad():
        latent, maps = model.encoder.encode_maps([x], [ids])
        wanted = model.unet([x], [ids], [none], [*maps, latent[:, None, None, None]])
        network.decoder.heads[0] = model.unet.decoder.heads[0]
        torch.testing.assert_close(network(x)[0], wanted, rtol=1e-4, atol=1e-4)
    assert {name.rsplit(".", 2)[0] for name in report.fresh} == {"decoder.heads"}
    assert report.adapted == report.unfit == {}
    assert report.lines()[-1] == "  pretrained: encoder, stem, skips, bottleneck and decoder, but the heads"
    assert all(not name.startswith("mask") for name in report.loaded)


def test_a_checkpoint_without_a_unet_leaves_the_network_around_the_encoder_alone(make_checkpoint, network_config):
    network = finetuned(network_config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = transfer_weights(network, PretrainedCheckpoint.load(make_checkpoint()[0]))
    assert set(report.fresh) == {name for name in before if not name.startswith("encoder.")}
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in report.fresh)
    assert report.unfit == {}
    assert "pretrained: encoder (the checkpoint holds no U-Net" in report.lines()[-1]


@pytest.mark.parametrize(
    ("change", "unfit", "adapted"),
    [
        ({"stem_features": 8}, {"stem", "decoder.up.0", "decoder.blocks.0"}, set()),
        ({"patch": (64, 64, 32)}, set(), {"decoder.up.4.weight"}),  # no room for a bottleneck along one axis
        ({"patch": (32, 32, 32)}, set(), set()),  # no bottleneck
        ({"channels": 2}, set(), {"encoder.stages.0.embed.proj.weight", "stem.conv1.0.weight",
                                  "stem.shortcut.0.weight"}),
        ({"n_conv_per_stage_decoder": 2}, {f"decoder.blocks.{level}" for level in range(5)}, set()),
        ({"decoder_features": [6, 6, 12, 24]}, {"skips.3", "bottleneck.0", "decoder.up.3", "decoder.up.4",
                                                "decoder.blocks.4"}, set()),
    ],
)  # fmt: skip
def test_only_what_fits_is_taken_and_the_rest_is_named(pretrained, network_config, change, unfit, adapted):
    model, checkpoint = pretrained()
    network = finetuned(network_config, **change)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = transfer_weights(network, checkpoint)
    after, source = network.state_dict(), model.unet.state_dict()
    assert {part for part in unfit if any(name.startswith(f"{part}.") for name in report.unfit)} == unfit
    assert all(name.startswith(tuple(f"{part}." for part in unfit)) for name in report.unfit)
    assert set(report.adapted) == adapted
    for name, value in after.items():
        if name in report.unfit or name.startswith("decoder.heads."):
            assert torch.equal(value, before[name]), name
            assert name in report.fresh
        elif name not in adapted and not name.startswith("encoder."):
            assert torch.equal(value, source[name]), name
    for part in unfit:
        assert part.split(".")[0] in report.lines()[-1].split("do not fit: ")[1]


def test_a_kernel_of_another_stride_is_the_mean_over_the_axis(pretrained, network_config):
    model, checkpoint = pretrained()
    network = finetuned(network_config, (64, 64, 32))
    report = transfer_weights(network, checkpoint)
    kernel = model.unet.decoder.up[4].weight
    torch.testing.assert_close(network.decoder.up[4].weight.data, (kernel[..., :1] + kernel[..., 1:]).data / 2)
    assert report.adapted["decoder.up.4.weight"] == "kernel (2, 2, 2) → (2, 2, 1), averaged or repeated"


def test_one_channel_in_every_channel_gives_the_same_stem(pretrained, network_config):
    model, checkpoint = pretrained()
    network = finetuned(network_config, channels=3)
    transfer_weights(network, checkpoint)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network.stem(x.expand(-1, 3, -1, -1, -1)), model.unet.stem(x), rtol=1e-4, atol=1e-5)
    assert F.mse_loss(network.stem.conv1[0].weight[:, :1] * 3, model.unet.stem.conv1[0].weight) < 1e-12


def test_plans_take_the_widths_of_the_checkpoints_unet(pretrained, network_config):
    _, checkpoint = pretrained()
    assert checkpoint.unet_widths == {
        "stem_features": 16, "decoder_features": [6, 6, 12, 12], "n_conv_per_stage_decoder": 1
    }  # fmt: skip
    wider = finetuned(network_config, stem_features=20, decoder_features=[8, 8, 8, 8], n_conv_per_stage_decoder=2)
    widths = replace(checkpoint, unet=wider.state_dict()).unet_widths
    assert widths == {"stem_features": 20, "decoder_features": [8, 8, 8, 8], "n_conv_per_stage_decoder": 2}
    fits = finetuned(network_config, **plans_architecture(network_config, (64, 64, 64), widths)["arch_kwargs"])
    assert {k: v.shape for k, v in fits.state_dict().items()} == {k: v.shape for k, v in wider.state_dict().items()}
    assert replace(checkpoint, unet={}).unet_widths == {}
