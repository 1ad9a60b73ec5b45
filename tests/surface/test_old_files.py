"""Files that an earlier state of the code has written, in `old`, are still read."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

PRETRAINED_PLANS = "nnUNetMiMPretrainedPlans"


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.fixture
def final(old):
    """The finished pretraining in `old`."""
    return old / "checkpoint_final.pth"


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_latest.pth", "export"])
def test_mim_inspect_reads_it(work, command, old, capsys, name):
    assert command("mim_inspect", old / name) == 0
    printed = capsys.readouterr().out
    assert "Dataset901_Labelled: 4 cases trained on; Dataset902_Images: 7 cases trained on" in printed
    assert f"training     {2 if 'latest' in name else 4} of 4 iterations of 1 crops" in printed
    assert "-1000 to 1000 HU, divided by 250" in printed


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "export"])
def test_mim_inspect_shows_it_at_work_on_a_ct(work, command, old, same_numbers, name):
    import SimpleITK as sitk

    hounsfield, _ = same_numbers.made_up_case(1, (40, 40, 40))
    image = sitk.GetImageFromArray(hounsfield.astype(np.int16))
    image.SetSpacing((2.5, 2.5, 3.0))
    sitk.WriteImage(image, "ct.nii.gz")
    assert command("mim_inspect", old / name, "-i", "ct.nii.gz", "-o", "looks") == 0
    assert (work / "looks" / "report.html").is_file()
    assert list((work / "looks").rglob("*.nii.gz"))


def test_continuing_an_old_run(work, command, old, final, small, same_numbers, without_removed):
    """With its settings from the checkpoint; it ends as it ended then."""
    run = same_numbers.pretraining_folder(work)
    run.mkdir(parents=True)
    for name in ("checkpoint_latest.pth", "train.csv", "val.csv", "config.yaml"):
        shutil.copy(old / name, run)
    assert command("mim_pretrain", *small[:9], "--workers", "0", "--c") == 0
    before, now = load(final), load(run / "checkpoint_final.pth")
    assert without_removed(now["mim_config"]) == without_removed(before["mim_config"])
    new = [{**case, "fingerprint": after["fingerprint"]} for case, after in zip(
        before["provenance"]["cases"], now["provenance"]["cases"], strict=True
    )]  # fmt: skip
    assert now["provenance"]["cases"] == new, "nothing but the fingerprints is new"
    assert list(now["network_weights"]) == list(before["network_weights"])
    for name, weight in before["network_weights"].items():
        torch.testing.assert_close(now["network_weights"][name], weight, rtol=1e-2, atol=5e-5, msg=name)
    for part, iterations in {"train": ["1", "2", "3", "4"], "val": ["0", "2", "4"]}.items():
        with (run / f"{part}.csv").open() as file, (old / f"{part}.csv").open() as old_file:
            rows, old_rows = list(csv.reader(file)), list(csv.reader(old_file))
        assert rows[: len(old_rows)] == old_rows, "what was measured stays"
        assert [row[0] for row in rows[1:]] == iterations
        assert {len(row) for row in rows} == {len(old_rows[0])}


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "export"])
def test_a_run_from_old_weights(work, command, old, final, one_iteration, same_numbers, name):
    options = ("learning_rate=1e-12", "--init", old / name, "-o", "init")
    assert command("mim_pretrain", *one_iteration, *options) == 0
    run = same_numbers.pretraining_folder(work)
    run = run.parents[1] / run.parent.name.replace("MiMPretrain", "MiMPretrain_init") / run.name
    before, now = load(final)["network_weights"], load(run / "checkpoint_final.pth")
    for name_of_weight, weight in before.items():
        torch.testing.assert_close(now["network_weights"][name_of_weight], weight, rtol=0, atol=1e-6)
    assert now["provenance"]["iterations"] == 1


def test_a_run_with_old_settings(work, command, old, same_numbers, without_removed):
    """--config with the config.yaml that a run left."""
    options = ("-d", "901", "902", "-f", "0", "-device", "cpu", "--workers", "0", "--set", "probe_every=0")
    assert command("mim_pretrain", *options, "--iterations", "1", "--config", old / "config.yaml") == 0
    now, before = (
        without_removed(load(folder / "checkpoint_final.pth")["mim_config"])
        for folder in (same_numbers.pretraining_folder(work), old)
    )
    assert now == {**before, "iterations": 1, "probe_every": 0}


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "export"])
def test_plans_for_it(work, command, old, name):
    assert command("mim_plan", "-d", "901", "-pc", old / name, "-o", PRETRAINED_PLANS) == 0
    plans = json.loads((work / f"nnUNet_preprocessed/Dataset901_Labelled/{PRETRAINED_PLANS}.json").read_text())
    assert plans["pretrain_info"].pop("checkpoint_path") == str(old / name)
    stored = json.loads((old / f"{PRETRAINED_PLANS}.json").read_text())
    stored["pretrain_info"].pop("checkpoint_path")
    assert plans == stored


def test_an_old_case_index_is_read(work, command, old, one_iteration, same_numbers):
    """What only the index knows, the hash of the image (here 17 everywhere), comes into the checkpoint."""
    folder = work / "nnUNet_preprocessed" / "Dataset901_Labelled" / "mim_case_index"
    folder.mkdir()
    shutil.copy(old / "case_index.npz", folder / "nnUNetPlans_3d_fullres.npz")
    assert command("mim_pretrain", *one_iteration) == 0
    cases = load(same_numbers.pretraining_folder(work) / "checkpoint_final.pth")["provenance"]["cases"]
    before = load(old / "checkpoint_final.pth")["provenance"]["cases"]
    assert [case["sha256"] for case in cases] == [case["sha256"] for case in before]
    hashes = {case["dataset"]: case.get("image_sha256", "") for case in cases}
    assert hashes["Dataset901_Labelled"] == "11" * 32
    assert hashes["Dataset902_Images"] == ""


@pytest.fixture
def trainer_of(work, old, final):
    """trainer_of(plans, **environment) → nnU-Net's trainer with plans of `old`, its network built and filled."""
    base = work / "nnUNet_preprocessed" / "Dataset901_Labelled"

    def make(plans_name, trainer="nnUNetTrainerMiM"):
        from nnunetv2.run.run_training import get_trainer_from_args

        plans = json.loads((old / f"{plans_name}.json").read_text())
        if "pretrain_info" in plans:
            assert plans["pretrain_info"]["checkpoint_path"] == final.name
            plans["pretrain_info"]["checkpoint_path"] = str(final)
        (base / f"{plans_name}.json").write_text(json.dumps(plans))
        shutil.copytree(base / "nnUNetPlans_3d_fullres", base / f"{plans_name}_3d_fullres")
        device = torch.device("cpu")
        made = get_trainer_from_args(base.name, "3d_fullres", 0, trainer, plans_name, device=device)
        made.initialize()
        return made

    return make


def test_finetuning_with_old_plans_loads_old_weights(trainer_of, final, frozen):
    network = trainer_of(PRETRAINED_PLANS).network
    weights = {k: v for k, v in load(final)["network_weights"].items() if k.startswith("encoder.")}
    state = network.state_dict()
    assert {name for name in state if name.startswith("encoder.")} == set(weights)
    for name, weight in weights.items():
        assert torch.equal(state[name], weight), name
    frozen("files.json", "weights of a finetuning", {name: list(weight.shape) for name, weight in state.items()})


def test_old_plans_without_a_checkpoint_are_those_of_the_control(trainer_of):
    trainer = trainer_of("nnUNetMiMPlans", "nnUNetTrainerMiMScratch")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (2, 2)
    assert type(trainer.network).__name__ == "HybridUNet"
    assert trainer.plans_manager.plans["mim_finetune"]["mirror_axes"] == [0, 1]
