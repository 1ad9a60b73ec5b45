"""The command line of the few-shot protocol: the bench.yaml that it stands for."""

import re

import pytest

from nnunet_mim.benchmarking import experiment
from nnunet_mim.benchmarking.bench_file import (
    ArmSpec,
    Bench,
    DatasetSpec,
    _parse_arm,
    _settings_by_arm,
    arm_entries,
    read_bench,
)
from nnunet_mim.benchmarking.cli import main
from nnunet_mim.benchmarking.seeded_training import Length
from nnunet_mim.errors import MiMError

MIM, SCRATCH = ArmSpec("MiM", "nnUNetTrainerMiM", "P", "a.pth"), ArmSpec("Scratch", "nnUNetTrainerMiMScratch", "P")


def test_arms_of_the_command_line():
    assert _parse_arm("MiM", "Q") == ArmSpec("MiM", "nnUNetTrainerMiM", "Q")
    assert _parse_arm("A=nnUNetTrainer", "Q") == ArmSpec("A", "nnUNetTrainer", "Q")
    assert _parse_arm("A=T:P:/x/y.pth", "Q") == ArmSpec("A", "T", "P", "/x/y.pth")
    for text in ("Nothing", "=T", "A="):
        with pytest.raises(MiMError, match=f"--arms {text}: give MiM"):
            _parse_arm(text, "Q")


def test_settings_for_all_mim_arms_and_for_one():
    arms = (MIM, SCRATCH, ArmSpec("Stock", "nnUNetTrainer", "P"))
    assert _settings_by_arm({"Scratch.lr": 2, "lr": 1, "drop_path": 0.1}, arms) == {
        "MiM": {"lr": 1, "drop_path": 0.1},
        "Scratch": {"lr": 2, "drop_path": 0.1},
    }
    with pytest.raises(MiMError, match=r"--set Stock\.lr: no MiM arm Stock \(there are MiM, Scratch\)"):
        _settings_by_arm({"Stock.lr": 1}, arms)


def test_two_arms_of_one_name():
    with pytest.raises(MiMError, match="arm MiM is there twice"):
        arm_entries(["MiM", "MiM=nnUNetTrainer"], "P", {})


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A dataset without stock plans; returns (retry, experiment, bench.yaml) of every call that would train."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name / "Dataset501_X").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(experiment, "run_experiment", lambda bench, retry, text: calls.append((retry, bench, text)))
    return calls


def test_the_file_that_is_written_is_the_experiment_that_is_run(experiments, tmp_path):
    """Also with a relative checkpoint, which is looked for where the command was given."""
    words = "few_shot -d 501 -p Q -f 2 --labels 5 10% 5 all --seeds 2 --iterations 20 --iterations_per_epoch 10"
    arms = ["--arms", "MiM", "Scratch", "Old=nnUNetTrainerMiM::a/old_{fold}.pth", "nnUNet"]
    more = ["--set", "lr=1e-3", "Old.mirror_axes=0,1", "-device", "cpu", "--jobs", "2", "--allow-seen"]
    assert main([*words.split(), *arms, *more]) == 0
    ((retry, bench, text),) = experiments
    output = tmp_path / "nnUNet_results" / "Dataset501_X" / "few_shot__Q__3d_fullres__fold_2"
    checkpoint = str(tmp_path / "a" / "old_{fold}.pth")
    assert retry
    assert bench == Bench(
        datasets=(DatasetSpec("Dataset501_X", (2,)),),
        arms=(
            ArmSpec("MiM", "nnUNetTrainerMiM", "Q", None, {"lr": 1e-3}),
            ArmSpec("Scratch", "nnUNetTrainerMiMScratch", "Q", None, {"lr": 1e-3}),
            ArmSpec("Old", "nnUNetTrainerMiM", "Q", checkpoint, {"lr": 1e-3, "mirror_axes": [0, 1]}),
            ArmSpec("nnUNet", "nnUNetTrainer", "nnUNetPlans"),
        ),
        labels=("5", "10%", "all"), seeds=2, iterations=20, iterations_per_epoch=10, val_iterations=25, device="cpu",
        jobs=2, output=output, allow_seen=True,
    )  # fmt: skip
    output.mkdir()
    (output / "bench.yaml").write_text(text)
    assert read_bench(output / "bench.yaml") == bench


def test_the_defaults_of_the_protocol(experiments, capsys):
    assert main(["few_shot", "-d", "501"]) == 0
    ((_, bench, _),) = experiments
    assert "no stock arm: nnUNetPlans of Dataset501_X have not been preprocessed" in capsys.readouterr().out
    assert [arm.name for arm in bench.arms] == ["MiM", "Scratch"]
    assert {arm.plans for arm in bench.arms} == {"nnUNetMiMPlans"}
    assert (bench.labels, bench.seeds, bench.length) == (("5", "10", "20", "all"), 3, Length(100, 250, 25))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--seeds 0", "seeds 0: give a whole number from 1"),
        ("--fold -1", "datasets: Dataset501_X: folds -1: give a whole number from 0"),
        ("--set Scratch.num_epochs=1", "arms: Scratch: settings: num_epochs is the same for all arms"),
        ("--iterations 3", r"iterations \(3\) must be a multiple of iterations_per_epoch \(250\)"),
    ],
)
def test_bad_options_in_one_line(experiments, capsys, words, says):
    assert main(["few_shot", "-d", "501", *words.split()]) == 2
    assert re.search(f"error: {says}", capsys.readouterr().err)
    assert experiments == []


@pytest.mark.parametrize("label", ["05", "010%"])
def test_labels_with_a_zero_in_front_are_refused_as_in_a_file(experiments, tmp_path, capsys, label):
    assert main(["few_shot", "-d", "501", "--labels", label]) == 2
    assert f"labels {label}: leave the 0 in front out" in capsys.readouterr().err
    path = tmp_path / "bench.yaml"
    path.write_text(f'datasets: [501]\narms: [MiM]\nlabels: ["{label}"]')
    with pytest.raises(MiMError, match="leave the 0"):
        read_bench(path)
