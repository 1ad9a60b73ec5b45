"""What is read out of nnU-Net's plans."""

import json

import pytest

from nnunet_mim.config import PRESETS
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.nnunet.plans import (
    HYBRID_UNET,
    configuration_of,
    n_channels,
    saved_architecture,
    spacings_alike,
    uses_hybrid_unet,
)


def plans_with(**configurations):
    """Plans in which every configuration has what all have to have."""
    common = {
        "data_identifier": "P_c", "batch_size": 2, "patch_size": [8, 8, 8], "spacing": [1.0, 1.0, 1.0],
        "median_image_size_in_voxels": [9.0, 9.0, 9.0], "normalization_schemes": ["NoNormalization"],
        "architecture": {"network_class_name": "x.Net", "arch_kwargs": {}, "_kw_requires_import": []},
    }  # fmt: skip
    return {
        "dataset_name": "D", "plans_name": "P", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {},
        "configurations": {name: {**common, **content} for name, content in configurations.items()},
    }  # fmt: skip


def test_our_network_is_recognised_by_its_class_name():
    assert f"{HybridUNet.__module__}.{HybridUNet.__name__}" == HYBRID_UNET
    assert uses_hybrid_unet({"architecture": {"network_class_name": HYBRID_UNET}})
    assert not uses_hybrid_unet({"architecture": {"network_class_name": "a.b.HybridUNet"}})
    assert not uses_hybrid_unet({"architecture": {"network_class_name": "x.PlainConvUNet"}})
    assert not uses_hybrid_unet({})


@pytest.mark.parametrize(
    ("name", "says"),
    [("nope", "available are 2d, casc"), ("2d", "is 2-D"), ("casc", "is a cascade")],
)
def test_configurations_that_cannot_be_used(name, says):
    plans = plans_with(**{"2d": {"patch_size": [8, 8]}, "casc": {"patch_size": [8, 8, 8], "previous_stage": "low"}})
    with pytest.raises(MiMError, match=says):
        configuration_of(plans, name)


def test_inherited_settings_are_filled_in():
    plans = plans_with(a={"patch_size": [8, 8, 8], "batch_size": 2}, b={"inherits_from": "a", "batch_size": 3})
    assert configuration_of(plans, "b")["patch_size"] == [8, 8, 8]
    assert configuration_of(plans, "b")["batch_size"] == 3


def test_number_of_channels_under_both_names():
    assert n_channels({"channel_names": {"0": "CT"}}) == n_channels({"modality": {"0": "CT"}}) == 1


def test_spacings_alike_up_to_the_ratio_on_every_axis():
    assert spacings_alike([3.0, 1.0, 1.0], [2.0, 1.0, 1.5])
    assert not spacings_alike([3.1, 1.0, 1.0], [2.0, 1.0, 1.0])


def test_saved_architecture_counts_only_where_a_fold_has_a_checkpoint(tmp_path):
    architecture = plans_architecture(PRESETS["tiny"], (8, 8, 8))
    (tmp_path / "plans.json").write_text(json.dumps(plans_with(c={"architecture": architecture})))
    assert saved_architecture(tmp_path, "c") is None
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_latest.pth").touch()
    assert saved_architecture(tmp_path, "c") == architecture
    assert saved_architecture(tmp_path, "other") is None
