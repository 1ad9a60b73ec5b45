"""nnUNetTrainerMiM and its control, run in this process on a toy dataset."""

import inspect
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_mim.errors import MiMError
from nnunet_mim.networks.hybrid_unet import HybridUNet
from nnunet_mim.trainers import nnUNetTrainerMiM, nnUNetTrainerMiMScratch
from nnunet_mim.trainers.optim import lr_factor

CPU = torch.device("cpu")


def start(trainer_class, plans, dataset_json, fold=0, resume=False, configuration="3d_fullres"):
    """A trainer as nnUNetv2_train makes it."""
    return trainer_class({**deepcopy(plans), "continue_training": resume}, configuration, fold, dataset_json, CPU)


def log_text(trainer):
    return Path(trainer.log_file).read_text()


def batch(trainer, seed=0):
    torch.manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales()
    targets = [
        torch.randint(0, 2, (2, 1, *[round(n * s) for n, s in zip(patch, scale, strict=True)])) for scale in scales
    ]
    return {"data": torch.randn(2, 1, *patch), "target": targets}


def test_signature_is_the_base_classs():
    """nnU-Net rebuilds trainers from the names in this signature."""
    for trainer in (nnUNetTrainerMiM, nnUNetTrainerMiMScratch):
        assert list(inspect.signature(trainer.__init__).parameters) == list(
            inspect.signature(nnUNetTrainer.__init__).parameters
        )


def test_pretrained_weights_of_nnu_net_are_refused_in_one_line(folders):
    train = Path(sys.executable).with_name("nnUNetv2_train")
    command = [train, "7", "3d_fullres", "0", "-tr", "nnUNetTrainerMiM", "-pretrained_weights", "a.pth"]
    done = subprocess.run([*command, "-device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: -pretrained_weights is not for nnUNetTrainerMiM")
    assert "nnUNet_mim_checkpoint=FILE" in line


def test_fresh_training_loads_every_encoder_weight_and_logs_it(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch
):
    path, encoder = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    trainer = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    trainer.initialize()
    for name, parameter in encoder.state_dict().items():
        assert torch.equal(trainer.network.encoder.state_dict()[name], parameter)
    log = log_text(trainer)
    assert f"parameters loaded: {len(encoder.state_dict())} (" in log
    assert "adapted: 0 (0 values), fresh: " in log
    assert "encoder.vit_blocks.1.mlp.fc2.weight" not in log, "names are in mim_transfer.json"


def test_control_has_the_same_network_and_recipe_and_random_weights(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch
):
    path, encoder = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    pretrained, control = (start(t, mim_plans, dataset_json) for t in (nnUNetTrainerMiM, nnUNetTrainerMiMScratch))
    pretrained.initialize()
    control.initialize()
    shapes = [{k: v.shape for k, v in t.network.state_dict().items()} for t in (pretrained, control)]
    assert shapes[0] == shapes[1]
    assert pretrained.finetune == control.finetune
    assert pretrained.optimizer.defaults == control.optimizer.defaults
    name = "vit_blocks.0.attn.qkv.weight"
    assert not torch.equal(control.network.encoder.state_dict()[name], encoder.state_dict()[name])
    assert "Pretrained weights" not in log_text(control)


def test_the_recipe_of_the_plans_reaches_nnunet(folders, mim_plans, dataset_json):
    mim_plans["mim_finetune"] = {
        "num_epochs": 7, "iterations_per_epoch": 3, "val_iterations_per_epoch": 2, "oversample_foreground": 0.8,
        "deep_supervision": False, "mirror_axes": [1],
    }  # fmt: skip
    trainer = start(nnUNetTrainerMiMScratch, mim_plans, dataset_json)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (7, 3, 2)
    assert trainer.oversample_foreground_percent == 0.8
    assert not trainer.enable_deep_supervision
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == (1,)
    assert trainer.inference_allowed_mirroring_axes == (1,)


@pytest.mark.parametrize("labels", [{"background": 0, "organ": 1}, {"background": 0, "all": [1, 2], "core": 2}])
def test_untrained_heads_know_that_most_is_background(folders, mim_plans, dataset_json, labels):
    """Classes share the foreground, a region has all of it; 0 leaves the heads as nnU-Net makes them."""
    dataset_json["labels"] = labels
    regions = "core" in labels
    if regions:
        dataset_json["regions_class_order"] = [1, 2]
    share = {}
    for prior in (0.04, 0):
        mim_plans["mim_finetune"] = {"foreground_prior": prior}
        trainer = start(nnUNetTrainerMiMScratch, mim_plans, dataset_json)
        trainer.initialize()
        with torch.no_grad():
            trainer.network.decoder.heads[0].weight.zero_()
            logits = trainer.network(batch(trainer)["data"])[0]
        foreground = logits.sigmoid() if regions else logits.softmax(1)[:, 1:]
        share[prior] = foreground.mean().item()
    assert share == pytest.approx({0.04: 0.04, 0: 0.5})


def test_control_needs_no_checkpoint_and_the_trainer_never_goes_on_without(folders, mim_plans, dataset_json):
    start(nnUNetTrainerMiMScratch, mim_plans, dataset_json).initialize()
    with pytest.raises(MiMError, match="no pretraining checkpoint for Dataset007_Toy"):
        start(nnUNetTrainerMiM, mim_plans, dataset_json)
    results = folders / "nnUNet_results"
    assert not list(results.rglob("nnUNetTrainerMiM__*")), "an error must not leave an output folder"


def test_train_steps_follow_the_schedule_and_a_resumed_run_continues_it(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch
):
    path, _ = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    length = {"num_epochs": 3, "iterations_per_epoch": 2}
    mim_plans["mim_finetune"] = {**length, "lr": 0.01, "warmup_fraction": 0.5, "layer_decay": 0.9}
    trainer = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    trainer.initialize()
    seen = []
    for epoch in range(2):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for _ in range(2):
            assert np.isfinite(trainer.train_step(batch(trainer))["loss"])
            seen.append(trainer.optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.01 * lr_factor(i, 6, trainer.finetune) for i in range(4)])
    assert seen[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")

    path.unlink()
    monkeypatch.delenv("nnUNet_mim_checkpoint")
    resumed = start(nnUNetTrainerMiM, mim_plans, dataset_json, resume=True)
    resumed.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert resumed.current_epoch == 2
    for a, b in zip(trainer.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    resumed.on_train_epoch_start()
    resumed.train_step(batch(resumed))
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * lr_factor(4, 6, trainer.finetune))
    scales = {round(g["lr"] / resumed.optimizer.param_groups[0]["lr"], 6) for g in resumed.optimizer.param_groups}
    assert scales == {round(0.9**d, 6) for d in range(7)}


def test_without_deep_supervision(folders, mim_plans, dataset_json, make_checkpoint, monkeypatch):
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    mim_plans["mim_finetune"]["deep_supervision"] = False
    trainer = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    trainer.initialize()
    trainer.set_deep_supervision_enabled(False)
    trainer.train_step({"data": torch.randn(2, 1, 32, 32, 32), "target": torch.randint(0, 2, (2, 1, 32, 32, 32))})
    trained = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    without_gradient = [n for n, p in trainer.network.named_parameters() if id(p) in trained and p.grad is None]
    assert without_gradient == []


def test_stock_trainer_trains_the_same_plans(folders, mim_plans, dataset_json):
    trainer = start(nnUNetTrainer, mim_plans, dataset_json)
    trainer.initialize()
    assert isinstance(trainer.network, HybridUNet)
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(batch(trainer))["loss"])


@pytest.mark.parametrize(("axes", "expected"), [(None, (0, 1)), ([0, 1, 2], (0, 1, 2)), ([], None)])
def test_mirroring_in_augmentation_and_prediction(folders, mim_plans, dataset_json, axes, expected):
    mim_plans["mim_finetune"]["mirror_axes"] = axes
    trainer = start(nnUNetTrainerMiMScratch, mim_plans, dataset_json)
    *_, augmented = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert augmented == (expected or ())
    assert trainer.inference_allowed_mirroring_axes == expected


def test_other_units_are_announced(folders, mim_plans, dataset_json, make_checkpoint, monkeypatch):
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    mim_plans["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] = -103.0
    trainer = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    trainer.on_train_start()
    assert "do not see the same units" in log_text(trainer)


def test_saved_plans_rebuild_the_network_for_prediction(folders, plans, dataset_json, make_checkpoint, monkeypatch):
    """Stock plans: the checkpoint decides the network, and plans.json keeps it for when the checkpoint is gone."""
    path, _ = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    trainer = start(nnUNetTrainerMiM, plans, dataset_json)
    assert "replaced by HybridUNet of the checkpoint" in log_text(trainer)
    trainer.on_train_start()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    path.unlink()
    monkeypatch.delenv("nnUNet_mim_checkpoint")

    saved = json.loads(Path(trainer.output_folder_base, "plans.json").read_text())
    assert saved["configurations"]["3d_fullres"]["architecture"]["network_class_name"].endswith(".HybridUNet")
    assert saved["mim_finetune"]["lr"] == trainer.finetune.lr
    resumed = start(nnUNetTrainerMiM, plans, dataset_json, resume=True)
    resumed.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    control = start(nnUNetTrainerMiMScratch, plans, dataset_json)
    assert "whose control this is" in log_text(control)
    control.initialize()
    sizes = [[tuple(p.shape) for p in t.network.parameters()] for t in (trainer, resumed, control)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_control_on_stock_plans_alone_uses_the_default_preset_and_says_so(folders, plans, dataset_json):
    trainer = start(nnUNetTrainerMiMScratch, plans, dataset_json)
    assert "the default preset base" in log_text(trainer)
    kwargs = trainer.configuration_manager.network_arch_init_kwargs
    assert kwargs["embed_dims"] == [48, 96, 192, 384]


def test_folds_of_another_architecture_are_protected(
    folders, plans, mim_plans, dataset_json, make_checkpoint, monkeypatch, network_config
):
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    trainer = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    trainer.on_train_start()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    other = deepcopy(mim_plans)
    other["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["stem_features"] = 24
    with pytest.raises(MiMError, match="folds of another architecture"):
        start(nnUNetTrainerMiM, other, dataset_json, fold=1)
    dropping = deepcopy(mim_plans)
    dropping["mim_finetune"]["drop_path"] = 0.2  # a matter of the recipe: no other architecture
    start(nnUNetTrainerMiM, dropping, dataset_json, fold=1)


def test_drop_path_and_the_rest_of_the_encoder_reach_the_network(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch
):
    """Stochastic depth in both arms; the encoder rests at first in the pretrained one alone."""
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    mim_plans["mim_finetune"] |= {"drop_path": 0.25, "decoder_first_fraction": 0.5}
    rates = {}
    for kind in (nnUNetTrainerMiM, nnUNetTrainerMiMScratch):
        trainer = start(kind, mim_plans, dataset_json)
        trainer.initialize()
        encoder = trainer.network.encoder
        assert encoder.stages[0].blocks[0].drop_path.probability == 0
        assert encoder.vit_blocks[-1].drop_path.probability == pytest.approx(0.25)
        trainer.lr_scheduler.step(0)
        trainer.lr_scheduler.advance()
        rates[kind] = {group["encoder"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates[nnUNetTrainerMiM][True] == 0 < rates[nnUNetTrainerMiM][False]
    assert rates[nnUNetTrainerMiMScratch][True] == rates[nnUNetTrainerMiMScratch][False] > 0


def test_validation_after_the_checkpoint_is_gone(folders, mim_plans, dataset_json, make_checkpoint, monkeypatch):
    path, _ = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    trainer = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    trainer.on_train_start()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    path.unlink()
    validating = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    validating.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    assert validating.inference_allowed_mirroring_axes == (0, 1)
    training_again = start(nnUNetTrainerMiM, mim_plans, dataset_json)
    with pytest.raises(MiMError, match="does not exist"):
        training_again.initialize()


def bad_resume(plans):
    plans["continue_training"] = True


def bad_key(plans):
    plans["mim_finetune"]["learning_rate"] = 1


def bad_network(plans):
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["depths"] = [1, 1, 1, 3]


def bad_preprocessing(plans):
    plans["configurations"]["3d_fullres"]["data_identifier"] = "never_preprocessed"


def bad_cascade(plans):
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bad_resume, "--c: nothing to continue"),
        (bad_key, "unknown setting 'learning_rate'"),
        (bad_network, "another architecture"),
        (bad_cascade, "cascade"),
        (bad_preprocessing, "nnUNetv2_preprocess -d .* -plans_name .* -c 3d_fullres"),
    ],
)
def test_bad_input_is_one_line_before_any_folder_is_made(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch, damage, message
):
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    mim_plans["continue_training"] = False
    damage(mim_plans)
    with pytest.raises(MiMError, match=message) as error:
        nnUNetTrainerMiM(mim_plans, "3d_fullres", 0, dataset_json, CPU)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, SystemExit), "nnUNetv2_train would print a traceback"
    assert error.value.code == f"error: {error.value}"
    assert not list((folders / "nnUNet_results").iterdir())


def test_checkpoint_for_another_number_of_channels(folders, mim_plans, dataset_json, make_checkpoint, monkeypatch):
    path, _ = make_checkpoint(in_channels=3)
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    with pytest.raises(MiMError, match="3 channels"):
        nnUNetTrainerMiM(mim_plans, "3d_fullres", 0, dataset_json, CPU)


@pytest.mark.parametrize(("configuration", "message"), [("2d", "2-D"), ("3d_lowres", "available are 2d, 3d_fullres")])
def test_wrong_configuration(folders, plans, dataset_json, configuration, message):
    with pytest.raises(MiMError, match=message):
        start(nnUNetTrainerMiMScratch, plans, dataset_json, configuration=configuration)


def test_results_folder_not_set(folders, plans, dataset_json, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(MiMError, match="nnUNet_results is not set"):
        start(nnUNetTrainerMiMScratch, plans, dataset_json)


def test_patch_that_does_not_divide_is_mentioned(folders, plans, dataset_json, make_checkpoint, monkeypatch):
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    plans["configurations"]["3d_fullres"]["patch_size"] = [20, 40, 32]
    trainer = start(nnUNetTrainerMiM, plans, dataset_json)
    assert "is no multiple of [4, 4, 4]" not in log_text(trainer)
    plans["configurations"]["3d_fullres"]["patch_size"] = [18, 40, 32]
    trainer = start(nnUNetTrainerMiM, plans, dataset_json)
    assert "is no multiple of [4, 4, 4]" in log_text(trainer)
    trainer.initialize()
    trainer.train_step(batch(trainer))
