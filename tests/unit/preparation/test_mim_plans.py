"""`mim_plan`: what the plans hold, what the command prints, one-line errors."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.config import PRESETS, NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import HybridUNet
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.preparation.cli import main
from nnunet_mim.preparation.mim_plans import _median_shape, _suitable_patch, make_mim_plans
from nnunet_mim.trainers.finetune_config import FinetuneConfig

DATASET = "Dataset007_Toy"
NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
FINGERPRINT = {"spacings": [[3.0, 1.0, 1.0], [3.0, 2.0, 1.0]], "shapes_after_crop": [[60, 180, 180], [60, 90, 180]]}
STOCK_WINDOW = {
    "percentile_00_5": -103.0, "percentile_99_5": 164.0, "mean": 19.0, "std": 46.0,
    "min": -407.0, "max": 1512.0, "median": 24.0,
}  # fmt: skip


@pytest.fixture
def base_plans():
    shared = {"batch_size": 2, "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False]}
    fullres = {
        **shared,
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [56, 192, 160],
        "median_image_size_in_voxels": [60.0, 180.0, 180.0],
        "spacing": [3.0, 1.0, 1.0],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3},
        "architecture": {"network_class_name": "x.PlainConvUNet", "arch_kwargs": {}, "_kw_requires_import": []},
        "batch_dice": True,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": dict(STOCK_WINDOW)},
        "configurations": {
            "2d": {**fullres, "patch_size": [192, 160]},
            "3d_lowres": {**fullres, "next_stage": "3d_cascade_fullres"},
            "3d_fullres": fullres,
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }


@pytest.fixture
def dataset_json():
    return {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}


@pytest.fixture
def make_checkpoint(tmp_path):
    def make(spacing=(3.0, 1.0, 1.0), window=None, channels=1, scheme="CTNormalization"):
        window = window or {**STOCK_WINDOW, "percentile_00_5": -500.0}
        stored = {
            "network_weights": dict(MaskInMask(NETWORK, channels).state_dict()),
            "mim_config": PretrainConfig(
                preset="tiny", network=NETWORK, in_channels=channels, view_size=(64, 64, 64)
            ).to_dict(),
            "provenance": {
                "spacing": list(spacing or ()), "normalization": [scheme] * channels,
                "intensity_properties": {str(c): window for c in range(channels)}, "cases": [],
            },
        }  # fmt: skip
        torch.save(stored, tmp_path / "pretrained.pth")
        return tmp_path / "pretrained.pth"

    return make


@pytest.fixture
def dataset(tmp_path, monkeypatch, base_plans, dataset_json):
    """Folder of the dataset in nnUNet_preprocessed, planned by nnU-Net."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    folder.mkdir()
    for name, content in (("nnUNetPlans", base_plans), ("dataset", dataset_json), ("dataset_fingerprint", FINGERPRINT)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def plan(base_plans, dataset_json, **kwargs):
    return make_mim_plans(base_plans, FINGERPRINT, dataset_json, "nnUNetMiMPlans", **kwargs)


def test_plans_hold_one_configuration_with_our_network(base_plans, dataset_json):
    before = deepcopy(base_plans)
    plans, _ = plan(base_plans, dataset_json, preset="tiny")
    assert base_plans == before
    assert list(plans["configurations"]) == ["3d_fullres"]
    config = plans["configurations"]["3d_fullres"]
    assert config["data_identifier"] == "nnUNetMiMPlans_3d_fullres"
    assert plans["plans_name"] == "nnUNetMiMPlans"
    assert config["patch_size"] == [56, 192, 160]
    assert "pretrain_info" not in plans

    manager = PlansManager(json.loads(json.dumps(plans))).get_configuration("3d_fullres")
    network = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        1,
        2,
    )
    assert type(network) is HybridUNet
    assert network.encoder.config.embed_dims == PRESETS["tiny"].embed_dims
    assert [list(s) for s in manager.pool_op_kernel_sizes] == [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 4]


def test_the_window_makes_nnunets_own_code_keep_lung_and_bone(base_plans, dataset_json):
    plans, _ = plan(base_plans, dataset_json)
    properties = plans["foreground_intensity_properties_per_channel"]["0"]
    assert set(properties) == set(STOCK_WINDOW)
    hu = np.array([-2000.0, -850.0, 0.0, 250.0, 900.0, 3000.0], np.float32)
    normalised = CTNormalization(False, properties).run(hu)
    np.testing.assert_allclose(normalised, [-4, -3.4, 0, 1, 3.6, 4], rtol=1e-6)


def test_recipe_is_written_out_in_full_with_mirroring_off_left_right(base_plans, dataset_json):
    plans, _ = plan(base_plans, dataset_json, settings={"num_epochs": 7, "lr": 1e-4})
    recipe = FinetuneConfig.from_plans(plans)
    assert set(plans["mim_finetune"]) == set(FinetuneConfig().to_dict())
    assert (recipe.num_epochs, recipe.lr) == (7, 1e-4)
    assert recipe.mirror_axes == (1, 2)  # transpose_forward [2, 0, 1] puts left-right first
    assert FinetuneConfig.from_plans(
        plan(base_plans, dataset_json, settings={"mirror_axes": [0, 1, 2]})[0]
    ).mirror_axes == (0, 1, 2)


def test_a_checkpoint_decides_network_window_and_spacing(base_plans, dataset_json, make_checkpoint):
    path = make_checkpoint(spacing=(3.0, 1.2, 1.2))
    plans, notes = plan(base_plans, dataset_json, checkpoint=PretrainedCheckpoint.load(path))
    config = plans["configurations"]["3d_fullres"]
    assert config["architecture"]["arch_kwargs"]["embed_dims"] == [6, 6, 12, 12]
    assert config["spacing"] == [3.0, 1.2, 1.2]
    assert config["median_image_size_in_voxels"] != [60.0, 180.0, 180.0]
    assert plans["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] == -500.0
    assert any("as in pretraining" in note for note in notes)
    assert plans["pretrain_info"] == {
        "checkpoint_path": str(path), "pt_num_in_channels": 1, "pt_used_patchsize": [64, 64, 64],
        "key_to_encoder": "encoder", "key_to_stem": "encoder.stages.0.embed",
        "keys_to_in_proj": ["encoder.stages.0.embed.proj"], "key_to_lpe": None,
    }  # fmt: skip


def test_a_far_spacing_and_another_modality_are_not_taken_over(base_plans, dataset_json, make_checkpoint):
    checkpoint = PretrainedCheckpoint.load(make_checkpoint(spacing=(3.0, 3.0, 3.0), scheme="ZScoreNormalization"))
    plans, notes = plan(base_plans, dataset_json, checkpoint=checkpoint)
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3.0, 1.0, 1.0]
    assert plans["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] == -1000.0
    assert sum("WARNING" in note for note in notes) == 2


def test_strides_are_those_of_the_spacing_where_it_is_not_the_pretrainings(base_plans, dataset_json, make_checkpoint):
    def strides_and_notes(**kwargs):
        plans, notes = plan(base_plans, dataset_json, **kwargs)
        config = plans["configurations"]["3d_fullres"]
        return config["architecture"]["arch_kwargs"]["strides"][1:5], config["patch_size"], notes

    base_plans["configurations"]["3d_fullres"]["spacing"] = [5.0, 0.8, 0.8]
    own, patch, _ = strides_and_notes()
    far = PretrainedCheckpoint.load(make_checkpoint(spacing=(1.5, 1.5, 1.5)))
    strides, its_patch, notes = strides_and_notes(checkpoint=far)
    assert strides == own == [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert its_patch == patch
    assert any("kernels between stages are resized" in note for note in notes)
    same, _, notes = strides_and_notes(checkpoint=far, settings={"spacing": [1.5, 1.5, 1.5]})
    assert same == [list(stride) for stride in far.network.strides]
    assert not any("resized" in note for note in notes)
    unknown = PretrainedCheckpoint.load(make_checkpoint(spacing=None))
    assert strides_and_notes(checkpoint=unknown)[0] == [list(stride) for stride in unknown.network.strides]


def test_channels_that_are_no_ct_stay_as_they_are(base_plans, dataset_json):
    base_plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization", "ZScoreNormalization"]
    base_plans["foreground_intensity_properties_per_channel"]["1"] = dict(STOCK_WINDOW)
    dataset_json["channel_names"]["1"] = "PET"
    windows = plan(base_plans, dataset_json)[0]["foreground_intensity_properties_per_channel"]
    assert windows["0"]["percentile_00_5"] == -1000.0
    assert windows["1"] == STOCK_WINDOW


def test_median_shape_by_hand():
    """Cases of 180 × 180 × 180 mm; array order of the plans: x, z, y."""
    assert _median_shape(FINGERPRINT, [1.0, 3.0, 2.0], [2, 0, 1]) == [180.0, 60.0, 90.0]


@pytest.mark.parametrize(
    ("base", "median", "patch"),
    [
        ([56, 192, 160], [60, 180, 180], [64, 192, 160]),
        ([128, 128, 128], [50, 90, 300], [64, 96, 128]),
        ([20, 40, 7], [25, 39, 7], [16, 48, 16]),
    ],
)
def test_patch_is_the_nearest_multiple_that_the_data_fills(base, median, patch):
    assert _suitable_patch(base, median, (16, 16, 16)) == patch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3}, "did you mean 'num_epochs'"),
        ({"num_epochs": 0}, "num_epochs must be"),
        ({"patch_size": [60, 64, 64]}, "multiples of the token size"),
        ({"patch_size": 64}, "three numbers"),
        ({"spacing": [1, 1]}, "three numbers"),
        ({"spacing": [1, 0, 1]}, "above 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"ct_window": [300, -200]}, "lowest and the highest HU"),
        ({"ct_window": 300}, "lowest and the highest HU"),
    ],
)
def test_bad_settings(base_plans, dataset_json, settings, message):
    with pytest.raises(MiMError, match=message):
        plan(base_plans, dataset_json, settings=settings)


def test_another_ct_window(base_plans, dataset_json, make_checkpoint):
    plans, notes = plan(base_plans, dataset_json, settings={"ct_window": [-200, 300]})
    window = plans["foreground_intensity_properties_per_channel"]["0"]
    assert (window["percentile_00_5"], window["percentile_99_5"], window["mean"], window["std"]) == (-200, 300, 0, 250)
    assert any("-200…300 HU" in note and "--set" in note for note in notes)
    checkpoint = PretrainedCheckpoint.load(make_checkpoint())
    _, notes = plan(base_plans, dataset_json, checkpoint=checkpoint, settings={"ct_window": [-200, 300]})
    assert any("WARNING" in note and "in pretraining" in note for note in notes)


def test_settings_of_the_plan_itself(base_plans, dataset_json):
    settings = {"patch_size": [32, 64, 64], "spacing": [3.0, 2.0, 2.0], "batch_size": 4}
    config = plan(base_plans, dataset_json, settings=settings)[0]["configurations"]["3d_fullres"]
    assert {name: config[name] for name in settings} == settings
    assert config["median_image_size_in_voxels"] == [60.0, 90.0, 90.0]


def test_command_writes_the_file_and_says_what_to_run_next(dataset, capsys):
    assert main(["-d", "7", "--preset", "tiny", "--set", "num_epochs=5", "patch_size=32,64,64"]) == 0
    plans = json.loads((dataset / "nnUNetMiMPlans.json").read_text())
    assert plans["mim_finetune"]["num_epochs"] == 5
    assert not list(dataset.glob("*.tmp"))
    printed = capsys.readouterr().out
    for command in (
        "nnUNetv2_preprocess -d 007 -plans_name nnUNetMiMPlans -c 3d_fullres",
        "mim_pretrain -d 007 -p nnUNetMiMPlans -c 3d_fullres -f 0",
        "nnUNetv2_train 007 3d_fullres 0 -tr nnUNetTrainerMiM -p nnUNetMiMPlans",
    ):
        assert command in printed


def test_preprocessed_data_is_protected_but_the_recipe_can_change(dataset, capsys):
    assert main(["-d", DATASET]) == 0
    (dataset / "nnUNetMiMPlans_3d_fullres").mkdir()
    capsys.readouterr()
    assert main(["-d", DATASET, "--set", "num_epochs=9"]) == 0
    assert "nnUNetv2_preprocess" not in capsys.readouterr().out
    assert main(["-d", DATASET, "--set", "spacing=3,2,2"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert json.loads((dataset / "nnUNetMiMPlans.json").read_text())["configurations"]["3d_fullres"]["spacing"] == [
        3,
        1,
        1,
    ]
    assert main(["-d", DATASET, "--set", "spacing=3,2,2", "--overwrite"]) == 0
    assert "nnUNetv2_preprocess" in capsys.readouterr().out


def no_plans(folder):
    (folder / "nnUNetPlans.json").unlink()


def broken_plans(folder):
    (folder / "nnUNetPlans.json").write_text("{")


@pytest.mark.parametrize(
    ("arguments", "damage", "message"),
    [
        (["-d", "999"], None, "unknown dataset '999'"),
        (["-d", "abc"], None, "unknown dataset 'abc'"),
        (["-d", "7", "-c", "2d"], None, "2-D"),
        (["-d", "7", "-c", "3d_cascade_fullres"], None, "cascade"),
        (["-d", "7", "-c", "3d_other"], None, "available are"),
        (["-d", "7"], no_plans, "nnUNetv2_plan_and_preprocess -d 007 --no_pp"),
        (["-d", "7"], broken_plans, "cannot read"),
        (["-d", "7", "-pc", "/nowhere.pth"], None, "does not exist"),
        (["-d", "7", "-o", "nnUNetPlans"], None, "other than -p"),
        (["-d", "7", "-o", "a__b"], None, "single underscores"),
        (["-d", "7", "--set", "lr=fast"], None, "mim_finetune.lr"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(dataset, capsys, arguments, damage, message):
    if damage:
        damage(dataset)
    before = sorted(dataset.iterdir())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(dataset.iterdir()) == before


def test_checkpoint_options(dataset, capsys, make_checkpoint):
    path = make_checkpoint()
    assert main(["-d", "7", "-pc", str(path)]) == 0
    assert "mim_pretrain" not in capsys.readouterr().out
    assert main(["-d", "7", "-pc", str(path), "--preset", "base"]) == 2
    assert main(["-d", "7", "-pc", str(make_checkpoint(channels=2))]) == 2
    assert "2 channels, the dataset has 1" in capsys.readouterr().err


def test_preprocessed_folder_must_be_set_raw_need_not(dataset, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert main(["-d", "7"]) == 0
    monkeypatch.delenv("nnUNet_preprocessed")
    assert main(["-d", "7"]) == 2
    assert "nnUNet_preprocessed is not set" in capsys.readouterr().err


def test_axes_and_orientation_are_those_of_pretraining(base_plans, dataset_json, make_checkpoint):
    """The network has seen axes in the order of the image, turned to RAS; the base plans have (2, 0, 1), unturned."""
    path = make_checkpoint(spacing=(1.1, 1.0, 2.5))
    stored = torch.load(path)
    stored["provenance"] |= {"transpose_forward": [0, 1, 2], "image_reader_writer": "SimpleITKIOWithReorient"}
    torch.save(stored, path)
    before = deepcopy(base_plans)
    plans, notes = make_mim_plans(
        base_plans, FINGERPRINT, dataset_json, "P", checkpoint=PretrainedCheckpoint.load(str(path)), preset="tiny"
    )
    assert base_plans == before
    config = plans["configurations"]["3d_fullres"]
    assert plans["transpose_forward"] == plans["transpose_backward"] == [0, 1, 2]
    assert config["spacing"] == [1.1, 1.0, 2.5], "close to the base plans' 1, 1, 3 in this order"
    assert config["patch_size"] == [176, 160, 64]  # 192, 160, 56: multiples of the token, no larger than the image
    assert plans["mim_finetune"]["mirror_axes"] == [0, 1]
    assert plans["image_reader_writer"] == "SimpleITKIOWithReorient"
    assert "order of axes [0, 1, 2] (as in pretraining; base plans: [2, 0, 1])" in notes
    assert any("turned to RAS" in note for note in notes)


def test_another_reader_of_the_dataset_stays(base_plans, dataset_json, make_checkpoint):
    path = make_checkpoint()
    stored = torch.load(path)
    stored["provenance"] |= {"transpose_forward": [2, 0, 1], "image_reader_writer": "SimpleITKIOWithReorient"}
    torch.save(stored, path)
    base_plans["image_reader_writer"] = "Tiff3DIO"
    checkpoint = PretrainedCheckpoint.load(str(path))
    plans, _ = make_mim_plans(base_plans, FINGERPRINT, dataset_json, "P", checkpoint=checkpoint)
    assert plans["image_reader_writer"] == "Tiff3DIO"
    assert plans["transpose_forward"] == [2, 0, 1]


def test_tokens_follow_the_spacing(base_plans, dataset_json):
    plans, _ = make_mim_plans(base_plans, FINGERPRINT, dataset_json, "P", preset="tiny")
    strides = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"]
    assert strides[:3] == [[1, 1, 1], [1, 2, 2], [2, 2, 2]]  # 3 x 1 x 1 mm


def test_images_stored_otherwise_than_in_axial_slices_are_not_mirrored(dataset, capsys, monkeypatch, base_plans):
    """But if they are turned on reading, or mirroring has been asked for."""
    monkeypatch.setattr("nnunet_mim.preparation.cli.mirroring_is_unsafe", lambda raw, _: raw.name == DATASET)
    turned = {**base_plans, "image_reader_writer": "SimpleITKIOWithReorient"}
    (dataset / "turned.json").write_text(json.dumps(turned))
    for more, axes in (([], []), (["-p", "turned"], [1, 2]), (["--set", "mirror_axes=[0,1,2]"], [0, 1, 2])):
        assert main(["-d", "7", "--preset", "tiny", "--overwrite", *more]) == 0
        assert ("exchange left and right" in capsys.readouterr().out) == (axes == [])
        assert json.loads((dataset / "nnUNetMiMPlans.json").read_text())["mim_finetune"]["mirror_axes"] == axes


def test_the_unets_widths_are_those_of_a_checkpoint_with_one(base_plans, dataset_json, make_checkpoint):
    checkpoint = PretrainedCheckpoint.load(make_checkpoint())
    unet = {f"skips.{stage}.0.weight": torch.zeros(width, 1) for stage, width in enumerate((5, 6, 7, 8))}
    unet |= {"stem.conv1.0.weight": torch.zeros(9, 1), "decoder.blocks.0.0.0.weight": torch.zeros(9, 1)}
    for parameters, widths in (({}, (16, [6, 6, 12, 12])), (unet, (9, [5, 6, 7, 8]))):
        plans, _ = plan(base_plans, dataset_json, checkpoint=replace(checkpoint, unet=parameters))
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        assert (kwargs["stem_features"], kwargs["decoder_features"]) == widths
