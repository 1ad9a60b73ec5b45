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
        plans=check_plans(plans, "plans.json"),
        configuration="3d_fullres",
        plans_name="P",
        dataset="Dataset007_Toy",
        plans_file="plans.json",
    )
    settings = with_network_of_plans(merge_settings(settings), [source], False)
    return build_network(PretrainConfig.from_dict({**settings, "network": vars(PRESETS["tiny"])}))


RESENC = {"encoder": "resenc", "preset": "tiny", "view_size": [32, 32, 32]}


def test_every_mutation_of_a_residual_encoder(plans, junk, canary):
    """In plans and in the settings of a run alike."""
    block = canary.clean
    for path in junk.places(block):
        for value in JUNK:
            wrong = junk.put(block, path, value)
            found = one_line(lambda wrong=wrong: pretraining_network(with_architecture(plans, wrong), RESENC))
            given = {**RESENC, "architecture": wrong}
            again = one_line(lambda given=given: pretraining_network(with_architecture(plans, block), given))
            assert (found is None) == (again is None), (path, value)
    assert pretraining_network(with_architecture(plans, block), RESENC) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch_kwargs": ..., "_kw_requires_import": ...}, "has no arch_kwargs: leave it out"),
        ({"network_class_name": 5}, "network_class_name"),
        ({"arch_kwargs": {}}, "has no n_stages: leave it out"),
    ],
)
def test_an_architecture_in_the_settings_that_is_incomplete(plans, canary, junk, change, words):
    block = canary.clean
    for name, value in change.items():
        block = junk.put(block, (name,), value)
    with pytest.raises(MiMError, match=words):
        pretraining_network(with_architecture(plans, canary.clean), {**RESENC, "architecture": block})


OURS = plans_architecture(PRESETS["tiny"], (32, 32, 32))


def test_sizes_of_our_own_network_are_bounded(plans, junk):
    """A pretraining, mim_plan and a finetuning refuse plans before they build anything of them."""
    for path in junk.places(OURS["arch_kwargs"]):
        wrong = with_architecture(plans, junk.put(OURS, ("arch_kwargs", *path), HUGE))
        for run in (
            lambda wrong=wrong: pretraining_network(wrong, {}),
            lambda wrong=wrong: make_mim_plans(
                check_plans(wrong, "plans.json"), {}, {"channel_names": {"0": "CT"}}, "P"
            ),
            lambda wrong=wrong: resolve_plans(wrong, "3d_fullres", 0, {}, "nnUNetTrainerMiMScratch", pretrained=False),
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
