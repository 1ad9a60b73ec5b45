"""Blocks of plans and of `--config` that describe networks: sizes that nobody can build are refused in one line."""

import time
from copy import deepcopy
from types import SimpleNamespace

import pytest

from nnunet_mim.config import PRESETS, NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.nnunet.documents import check_plans
from nnunet_mim.preparation.mim_plans import make_mim_plans
from nnunet_mim.pretraining.configure import merge_settings, with_network_of_plans
from nnunet_mim.trainers.resolve_plans import resolve_plans

HUGE = 10**9
JUNK = [..., None, True, -1, 0, 5, 1.5, float("nan"), HUGE, "", "x", "\0", [], [[]], [1, 2], {}, {"x": 1}]


def residual_encoder():
    kwargs = {
        "n_stages": 4, "features_per_stage": [2, 3, 4, 4], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 4, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1] * 4, "n_conv_per_stage_decoder": [1] * 3, "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": kwargs, "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip


def places(value, path=()):
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutated(content, path, junk):
    content = deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    if junk is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = junk
    return content


def with_architecture(plans, block, **changes):
    plans = deepcopy(plans)
    fullres = {**plans["configurations"]["3d_fullres"], "architecture": block, **changes}
    return plans | {"configurations": {"3d_fullres": fullres}}


def one_line(run):
    """What a call returns, or None where it refuses in one line; neither takes long."""
    began = time.monotonic()
    try:
        result, said = run(), "taken: "
    except MiMError as error:
        result, said = None, str(error)
    assert len(said.splitlines()) == 1
    assert ": " in said
    assert time.monotonic() - began < 10
    return result


def pretraining_network(plans, settings):
    source = SimpleNamespace(
        plans=check_plans(plans, "plans.json"), configuration="3d_fullres", plans_name="P", dataset="Dataset007_Toy",
        plans_file="plans.json",
    )
    settings = with_network_of_plans(merge_settings(settings), [source], False)
    return build_network(PretrainConfig.from_dict({**settings, "network": vars(PRESETS["tiny"])}))


RESENC = {"encoder": "resenc", "preset": "tiny", "view_size": [32, 32, 32]}


def test_every_mutation_of_a_residual_encoder(plans):
    """In plans and in the settings of a run alike."""
    block = residual_encoder()
    for path in places(block):
        for junk in JUNK:
            wrong = mutated(block, path, junk)
            found = one_line(lambda wrong=wrong: pretraining_network(with_architecture(plans, wrong), RESENC))
            given = {**RESENC, "architecture": wrong}
            again = one_line(lambda given=given: pretraining_network(with_architecture(plans, block), given))
            assert (found is None) == (again is None), (path, junk)
    assert pretraining_network(with_architecture(plans, block), RESENC) is not None


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"network_class_name": residual_encoder()["network_class_name"]}, "has no arch_kwargs: leave it out"),
        ({**residual_encoder(), "network_class_name": 5}, "network_class_name"),
        ({**residual_encoder(), "arch_kwargs": {}}, "has no n_stages: leave it out"),
    ],
)
def test_an_architecture_in_the_settings_that_is_incomplete(plans, architecture, words):
    settings = {**RESENC, "architecture": architecture}
    with pytest.raises(MiMError, match=words):
        pretraining_network(with_architecture(plans, residual_encoder()), settings)


OURS = plans_architecture(PRESETS["tiny"], (32, 32, 32))


@pytest.mark.parametrize("path", list(places(OURS["arch_kwargs"])), ids=lambda path: ".".join(map(str, path)))
def test_sizes_of_our_own_network_are_bounded(plans, path):
    """A pretraining, mim_plan and a finetuning refuse plans before they build anything of them."""
    block = {**OURS, "arch_kwargs": mutated(OURS["arch_kwargs"], path, HUGE)}
    wrong = with_architecture(plans, block)
    for run in (
        lambda: pretraining_network(wrong, {}),
        lambda: make_mim_plans(check_plans(wrong, "plans.json"), {}, {"channel_names": {"0": "CT"}}, "P"),
        lambda: resolve_plans(wrong, "3d_fullres", 0, {}, "nnUNetTrainerMiMScratch", pretrained=False),
    ):
        with pytest.raises(MiMError, match=rf"arch_kwargs: {path[0]}.*: write the plans again with mim_plan"):
            run()


@pytest.mark.parametrize("preset", PRESETS)
def test_all_presets_are_within_the_bounds(plans, preset):
    check_plans(with_architecture(plans, plans_architecture(PRESETS[preset], (96, 96, 96))), "plans.json")


@pytest.mark.parametrize("patch", [[HUGE, 32, 32], [1024, 1024, 1024], [8192, 32, 32]])
def test_patches_are_bounded(plans, patch):
    with pytest.raises(MiMError, match=r"patch_size.* plan the dataset again"):
        check_plans(with_architecture(plans, OURS, patch_size=patch), "plans.json")
    if max(patch) < HUGE:
        base = check_plans(with_architecture(plans, OURS), "plans.json")
        with pytest.raises(MiMError, match=r"the patch has .* give a smaller one with --set patch_size"):
            make_mim_plans(base, {}, {"channel_names": {"0": "CT"}}, "P", settings={"patch_size": patch})
    check_plans(with_architecture(plans, OURS, patch_size=[512, 512, 512]), "plans.json")


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dims": (48, 96, 192, HUGE * 12)}, {"depths": (2, 2, 2, HUGE)}, {"mlp_ratio": 1e9},
        {"decoder_depth": HUGE}, {"decoder_embed_dim": HUGE * 48}, {"strides": ((2, 2, 2),) * 3 + ((2, 2, HUGE),)},
    ],
)  # fmt: skip
def test_sizes_in_the_settings_are_bounded(sizes):
    with pytest.raises(MiMError, match=r"at most 2048 channels, 64 blocks|from 1 to 4"):
        NetworkConfig(**sizes)
