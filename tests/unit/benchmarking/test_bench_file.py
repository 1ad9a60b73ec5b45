"""bench.yaml and the command line: the experiments that they stand for. Nothing of nnU-Net's folders is looked at."""

from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_mim.benchmarking.arms import ArmSpec, control_of
from nnunet_mim.benchmarking.bench_file import bench_of, read_bench
from nnunet_mim.benchmarking.cell import Length
from nnunet_mim.benchmarking.few_shot_cli import parse_arm, settings_by_arm
from nnunet_mim.benchmarking.matrix import Bench, DatasetSpec
from nnunet_mim.errors import MiMError

MIM, SCRATCH = ArmSpec("MiM", "nnUNetTrainerMiM", "P", "a.pth"), ArmSpec("Scratch", "nnUNetTrainerMiMScratch", "P")


def test_a_file_with_every_entry(tmp_path):
    (tmp_path / "bench.yaml").write_text("""
output: results
datasets: {501: {folds: [0, 3]}, Dataset502_X: {configuration: 3d_lowres}}
arms:
  MiM: {plans: MyPlans, checkpoint: "runs/{dataset}/fold_{fold}.pth", settings: {lr: 1e-3}}
  Scratch:
  Stock: {trainer: nnUNetTrainer, plans: nnUNetPlans}
  MAE: {nnssl_plans: ptPlans}
labels: [1%, 20, all]
seeds: 3
control: Stock
iterations: 1000
iterations_per_epoch: 100
val_iterations: 7
device: cuda
gpus: [0, 2]
nsd_tolerance_mm: 2
allow_seen: true
""")
    runs = f"{tmp_path}/runs/{{dataset}}/fold_{{fold}}.pth"
    assert read_bench(tmp_path / "bench.yaml") == Bench(
        datasets=(DatasetSpec("501", (0, 3)), DatasetSpec("Dataset502_X", (0,), "3d_lowres")),
        arms=(
            ArmSpec("MiM", "nnUNetTrainerMiM", "MyPlans", runs, {"lr": 0.001}),
            ArmSpec("Scratch", "nnUNetTrainerMiMScratch", "MyPlans"),
            ArmSpec("Stock", "nnUNetTrainer", "nnUNetPlans"),
            ArmSpec("MAE", "PretrainedTrainer", "ptPlans", command="nnUNetv2_train_pretrained"),
        ),
        labels=("1%", "20", "all"), seeds=3, length=Length(10, 100, 7), output=tmp_path / "results", control="Stock",
        device="cuda", gpus=("0", "2"), nsd_tolerance_mm=2.0, allow_seen=True,
    )  # fmt: skip


def test_where_checkpoints_are_looked_for(tmp_path):
    (tmp_path / "export").mkdir()
    given = {"a": "x.pth", "b": "/y.pth", "c": "export", "d": "someone/head-neck@main"}
    given |= {"pull": "someone/head-neck@refs/pr/1", "e": "runs/export_{fold}"}
    arms = {name: {"trainer": "nnUNetTrainerMiM", "plans": "P", "checkpoint": path} for name, path in given.items()}
    found = [arm.checkpoint for arm in bench_of({"datasets": [1], "arms": arms}, tmp_path).arms]
    assert found == [
        f"{tmp_path}/x.pth",
        "/y.pth",
        f"{tmp_path}/export",
        "someone/head-neck@main",
        "someone/head-neck@refs/pr/1",
        f"{tmp_path}/runs/export_{{fold}}",
    ]


def test_lists_are_enough_where_nothing_else_is_said():
    bench = bench_of({"datasets": [501], "arms": ["MiM", "nnUNet"]}, Path("x"))
    assert bench.datasets == (DatasetSpec("501"),)
    assert [arm.plans for arm in bench.arms] == ["nnUNetMiMPlans", "nnUNetPlans"]
    assert (bench.labels, bench.seeds, bench.length, bench.output) == (
        ("all",), 1, Length(1000, 250, 50), Path("x/bench")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"datasets": None}, "'datasets' is missing"),
        ({"arms": []}, "'arms' is missing"),
        ({"gpu": 1}, "unknown entry 'gpu': there are allow_seen, arms"),
        ({"arms": ["MiM", "MiM"]}, "arms: MiM is there twice"),
        ({"arms": ["Mine"]}, "arms: Mine: give trainer and plans"),
        ({"arms": {"MiM": {"plan": "P"}}}, "arms: MiM: unknown entry 'plan'"),
        ({"arms": {"MiM": "P"}}, "arms: MiM: give names and values"),
        ({"arms": {"MiM": {"settings": {"num_epochs": 3}}}}, "num_epochs is the same for all arms"),
        ({"arms": {"nnUNet": {"settings": {"lr": 3}}}}, "settings are for the MiM trainers"),
        ({"arms": {"A": {"nnssl_plans": "P", "plans": "Q"}}}, "only a trainer may be given"),
        ({"datasets": {"501": {"folds": [0, 0]}}}, "datasets: 501: folds .0, 0.: give different numbers"),
        ({"datasets": {"501": {"folds": ["all"]}}}, "give different numbers from 0"),
        ({"seeds": 0}, "seeds 0: give a whole number from 1"),
        ({"seeds": True}, "seeds True: give a whole number"),
        ({"iterations": 1001}, "must be a multiple of iterations_per_epoch"),
        ({"device": "gpu"}, "device gpu: give cuda, cpu or mps"),
        ({"device": "cpu", "gpus": [0]}, "'gpus' are for device cuda"),
        ({"slurm": "gpu"}, "'slurm' holds parameters of submitit"),
        ({"nsd_tolerance_mm": -1}, "give millimetres"),
    ],
)
def test_bad_entries_are_named(changes, says):
    with pytest.raises(MiMError, match=says):
        bench_of({"datasets": [501], "arms": ["MiM"], **changes}, Path("x"))


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text("datasets: [501]")
    with pytest.raises(MiMError, match=r"bench\.yaml: 'arms' is missing"):
        read_bench(path)
    path.write_text("datasets: [010]\narms: [MiM]")
    with pytest.raises(MiMError, match=r"bench\.yaml: 010: YAML reads numbers that begin with 0 as octal"):
        read_bench(path)
    path.write_text("datasets: [10, Dataset010_Colon]\narms: [MiM]\nnsd_tolerance_mm: 0.5\noutput: 2026-01-05")
    assert [spec.dataset for spec in read_bench(path).datasets] == ["10", "Dataset010_Colon"]
    with pytest.raises(MiMError, match=r"cannot read .*gone\.yaml"):
        read_bench(tmp_path / "gone.yaml")


def test_the_control():
    stock = ArmSpec("nnUNet", "nnUNetTrainer", "nnUNetPlans")
    pretrained = ArmSpec("CNN", "nnUNetTrainer", "P", "cnn.pth")
    assert control_of([stock, MIM, SCRATCH]) == "Scratch"
    assert control_of([pretrained, MIM, stock]) == "nnUNet"
    assert control_of([MIM, replace(MIM, name="Last")]) == "Last"
    assert control_of([MIM, SCRATCH, stock], "nnUNet") == "nnUNet"
    with pytest.raises(MiMError, match="control Gone is none of the arms: MiM, Scratch"):
        control_of([MIM, SCRATCH], "Gone")


def test_arms_of_the_command_line():
    assert parse_arm("MiM", "Q") == ArmSpec("MiM", "nnUNetTrainerMiM", "Q")
    assert parse_arm("A=nnUNetTrainer", "Q") == ArmSpec("A", "nnUNetTrainer", "Q")
    assert parse_arm("A=T:P:/x/y.pth", "Q") == ArmSpec("A", "T", "P", "/x/y.pth")
    for text in ("Nothing", "=T", "A="):
        with pytest.raises(MiMError, match=f"--arms {text}: give MiM"):
            parse_arm(text, "Q")


def test_settings_for_all_mim_arms_and_for_one():
    arms = (MIM, SCRATCH, ArmSpec("Stock", "nnUNetTrainer", "P"))
    assert settings_by_arm({"Scratch.lr": 2, "lr": 1, "drop_path": 0.1}, arms) == {
        "MiM": {"lr": 1, "drop_path": 0.1},
        "Scratch": {"lr": 2, "drop_path": 0.1},
    }
    with pytest.raises(MiMError, match=r"--set Stock\.lr: no MiM arm Stock \(there are MiM, Scratch\)"):
        settings_by_arm({"Stock.lr": 1}, arms)
    with pytest.raises(MiMError, match="--set: num_epochs is the same for all arms"):
        settings_by_arm({"Scratch.num_epochs": 1}, arms)
