"""bench.yaml: the experiments that files stand for. nnU-Net's folders are not looked at."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from nnunet_mim.benchmarking.bench_file import KNOWN_ARMS, ArmSpec, Bench, DatasetSpec, bench_of, read_bench
from nnunet_mim.benchmarking.cell import control_of
from nnunet_mim.benchmarking.seeded_training import Length
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
            ArmSpec("MAE", "PretrainedTrainer", "ptPlans", nnssl_plans="ptPlans"),
        ),
        labels=("1%", "20", "all"), seeds=3, iterations=1000, iterations_per_epoch=100, val_iterations=7,
        output=tmp_path / "results", control="Stock",
        device="cuda", gpus=("0", "2"), nsd_tolerance_mm=2.0, allow_seen=True,
    )  # fmt: skip


def test_shipped_weights_go_by_their_name(tmp_path):
    arms = {"MiM": {"plans": "P", "checkpoint": "tiny-ct"}}
    assert bench_of({"datasets": [1], "arms": arms}, tmp_path).arms[0].checkpoint == "tiny-ct"
    (tmp_path / "tiny-ct").touch()
    assert bench_of({"datasets": [1], "arms": arms}, tmp_path).arms[0].checkpoint == str(tmp_path / "tiny-ct")


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
        ({"datasets": [501, 501]}, "datasets: 501 is there twice"),
        ({"arms": ["Mine"]}, "arms: Mine: give trainer and plans"),
        ({"arms": {"MiM": {"plan": "P"}}}, "arms: MiM: unknown entry 'plan'"),
        ({"arms": {"MiM": "P"}}, "arms: MiM: give names and values"),
        ({"arms": {"MiM": {"settings": {"num_epochs": 3}}}}, "num_epochs is the same for all arms"),
        ({"arms": {"nnUNet": {"settings": {"lr": 3}}}}, "settings are for the MiM trainers"),
        ({"arms": {"A": {"nnssl_plans": "P", "plans": "Q"}}}, "only a trainer may be given"),
        ({"datasets": {"501": {"folds": [0, 0]}}}, "datasets: 501: folds .0, 0.: give different numbers"),
        ({"datasets": {"501": {"folds": ["all"]}}}, "folds all: give a whole number from 0"),
        ({"seeds": 0}, "seeds 0: give a whole number from 1"),
        ({"seeds": True}, "seeds True: give a whole number"),
        ({"iterations": 1001}, "must be a multiple of iterations_per_epoch"),
        ({"device": "gpu"}, "device gpu: give cuda, cpu or mps"),
        ({"device": "cpu", "gpus": [0]}, "'gpus' are for device cuda"),
        ({"slurm": "gpu"}, "slurm: give parameters of submitit, such as {slurm_partition: gpu"),
        ({"nsd_tolerance_mm": -1}, "nsd_tolerance_mm -1: give a number from 0"),
        ({"nsd_tolerance_mm": "1 mm"}, "nsd_tolerance_mm 1 mm: give a number from 0"),
        ({"allow_seen": "no"}, "allow_seen no: give true or false"),
        ({"arms": {"MiM": {"settings": [1]}}}, "arms: MiM: settings: give names and values"),
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


DOCS = (Path(__file__).parents[3] / "docs" / "benchmark.md").read_text()


def test_the_table_of_the_documentation_has_every_entry_with_its_default():
    table = DOCS.split("| entry | default | |\n|---|---|---|\n")[1].split("\n\n")[0]
    documented = {}
    for row in table.splitlines():
        names, defaults = (re.sub("`", "", cell).strip() for cell in row.split(" | ")[:2])
        several = names.strip("| ").split(", ")
        documented |= dict(zip(several, defaults.split(", ") if len(several) > 1 else [defaults], strict=True))
    defaults = {f.name: f.default for f in fields(Bench)}
    assert set(documented) == set(defaults)
    for name, default in defaults.items():
        if isinstance(default, bool | int | float | str | Path) or name == "labels":
            written = yaml.safe_load(documented[name])
            assert written == (list(default) if name == "labels" else type(written)(default)), name
    assert all(f"`{f.name}`" in DOCS for f in fields(DatasetSpec)[1:])


def test_the_examples_of_the_documentation_are_read(tmp_path):
    first, arms = (text for text in re.findall("```yaml\n(.*?)```", DOCS, re.DOTALL))
    bench = bench_of(yaml.safe_load(first), tmp_path)
    assert [arm.name for arm in bench.arms] == list(KNOWN_ARMS)
    arms = yaml.safe_load(arms)["arms"]
    used = {entry for entries in arms.values() if entries for entry in entries}
    assert used == {f.name for f in fields(ArmSpec)[1:]}, "an example of every entry"
    assert len(bench_of({"datasets": [9], "arms": arms}, tmp_path).arms) == len(arms)
