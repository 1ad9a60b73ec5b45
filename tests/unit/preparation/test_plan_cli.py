"""What `mim_plan` says about readers that cannot turn images, and what it prints to be typed next."""

import json

import pytest
import torch

from nnunet_mim.preparation.cli import main

DATASET = "Dataset007_Toy"


@pytest.fixture
def dataset(tmp_path, monkeypatch, plans):
    """Folder of the dataset in nnUNet_preprocessed, planned by nnU-Net."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    folder.mkdir(parents=True)
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    fingerprint = {"spacings": [[2.0, 2.0, 2.0]], "shapes_after_crop": [[36, 40, 34]]}
    plans.pop("mim_finetune")
    for name, content in (("nnUNetPlans", plans), ("dataset", description), ("dataset_fingerprint", fingerprint)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_reader_that_cannot_turn_images_is_said_and_nothing_is_mirrored(
    dataset, capsys, monkeypatch, plans, make_checkpoint
):
    """Pretraining has seen turned images; the reader of the base plans leaves them as they are."""
    monkeypatch.setattr("nnunet_mim.preparation.cli.mirroring_is_unsafe", lambda raw, _: raw.name == DATASET)
    path, _ = make_checkpoint()
    stored = torch.load(path)
    stored["provenance"]["image_reader_writer"] = "SimpleITKIOWithReorient"
    torch.save(stored, path)
    (dataset / "other.json").write_text(json.dumps({**plans, "image_reader_writer": "Tiff3DIO"}))
    assert main(["-d", "7", "-pc", str(path)]) == 0
    said = capsys.readouterr().out
    assert "exchange left and right" not in said, "SimpleITKIO has a twin that turns them"
    assert "WARNING: images were turned" not in said
    assert main(["-d", "7", "-pc", str(path), "-p", "other", "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert "exchange left and right" in said
    assert "WARNING: images were turned to RAS in pretraining; Tiff3DIO, the reader of other, cannot" in said
    assert json.loads((dataset / "nnUNetMiMPlans.json").read_text())["mim_finetune"]["mirror_axes"] == []


def test_what_is_printed_next_can_be_typed(dataset, capsys, parsed_commands):
    for more in (["--preset", "tiny"], ["-p", "resenc", "--encoder", "resenc", "-o", "Res"]):
        if "resenc" in more:
            changed = json.loads((dataset / "nnUNetPlans.json").read_text())
            kwargs = {"n_stages": 3, "features_per_stage": [8, 8, 8], "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}
            name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
            architecture = {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": []}
            changed["configurations"]["3d_fullres"]["architecture"] = architecture
            (dataset / "resenc.json").write_text(json.dumps(changed))
        assert main(["-d", "7", *more]) == 0
        (command,) = [line for line in capsys.readouterr().out.splitlines() if "mim_pretrain" in line]
        (given,) = parsed_commands(command)
        assert (given.datasets, given.configuration, given.fold) == (["007"], "3d_fullres", "0")
        assert given.plans == ("Res" if "resenc" in more else "nnUNetMiMPlans")
        assert vars(given).get("encoder", "hybrid") == ("resenc" if "resenc" in more else "hybrid")


def test_a_misspelt_name_of_plans_is_answered_with_those_that_exist(dataset, capsys):
    assert main(["-d", "7", "-p", "TYPO"]) == 2
    error = capsys.readouterr().err
    assert "TYPO.json does not exist: choose base plans with -p (nnUNetPlans)\n" in error
    assert "--no_pp" not in error, "which makes plans of another name"
    (dataset / "nnUNetPlans.json").rename(dataset / "Other.json")
    assert main(["-d", "7"]) == 2
    assert "-p (Other), or run `nnUNetv2_plan_and_preprocess -d 007 --no_pp`" in capsys.readouterr().err


def width_in(folder, plans):
    config = json.loads((folder / f"{plans}.json").read_text())["configurations"]["3d_fullres"]
    return config["architecture"]["arch_kwargs"]["embed_dims"][0]


def test_the_network_is_that_of_base_plans_for_mim(dataset, capsys):
    assert main(["-d", "7", "-o", "First"]) == 0
    assert width_in(dataset, "First") == 48, "nnU-Net's own plans name none: base"
    assert main(["-d", "7", "-o", "Tiny", "--preset", "tiny"]) == 0
    assert main(["-d", "7", "-p", "Tiny", "-o", "Second", "--set", "num_epochs=5"]) == 0
    assert width_in(dataset, "Second") == width_in(dataset, "Tiny") == 12
    assert "network: HybridUNet tiny" in capsys.readouterr().out
    assert main(["-d", "7", "-p", "Tiny", "-o", "Third", "--preset", "small"]) == 0
    assert width_in(dataset, "Third") == 24


def test_base_plans_with_the_network_of_no_preset(dataset, capsys):
    assert main(["-d", "7", "-o", "Tiny", "--preset", "tiny"]) == 0
    plans = json.loads((dataset / "Tiny.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["depths"] = [1, 1, 1, 1]
    (dataset / "Tiny.json").write_text(json.dumps(plans))
    capsys.readouterr()
    assert main(["-d", "7", "-p", "Tiny", "-o", "Second"]) == 2
    assert "the network of plans Tiny is that of no preset: choose one with --preset (tiny, " in capsys.readouterr().err
    assert not (dataset / "Second.json").exists()
    assert main(["-d", "7", "-p", "Tiny", "-o", "Second", "--preset", "tiny"]) == 0
