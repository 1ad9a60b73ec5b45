"""bench.yaml of classifiers: the experiments that files stand for. nnU-Net's folders are not looked at."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from nnunet_mim.benchmarking.bench_file import read_bench
from nnunet_mim.benchmarking.classifiers.bench_file import (
    ClassifierArm,
    ClassifierBench,
    ClassifierDataset,
    classifier_bench_of,
    named_as_entries,
)
from nnunet_mim.classification.options import ClassifyConfig, DataOptions
from nnunet_mim.errors import MiMError
from nnunet_mim.system.cli import flags_of

PROBE = {"mode": "probe", "checkpoint": "none"}


def test_a_file_with_every_entry(tmp_path):
    (tmp_path / "bench.yaml").write_text("""
target: malignant
datasets: {503: {configuration: 3d_lowres}}
plans: nnUNetMiMPlans
arms:
  probe_mim: {mode: probe, checkpoint: runs/a.pth}
  probe_random: {mode: probe, checkpoint: none, settings: {window: 48}}
  finetune: {checkpoint: tiny-ct}
  scratch: {settings: {lr: 1e-3}}
labels: [10%, 50, all]
seeds: 3
settings: {roi: labels, margin: 5, covariate: age, labels: other.csv}
where: [diameter_mm, 6, 12]
control: scratch
device: cuda
gpus: [0, 2]
output: results
""")
    assert read_bench(tmp_path / "bench.yaml") == ClassifierBench(
        target=("malignant",), datasets=(ClassifierDataset("503", "3d_lowres"),), plans="nnUNetMiMPlans",
        arms=(
            ClassifierArm("probe_mim", "probe", str(tmp_path / "runs/a.pth")),
            ClassifierArm("probe_random", "probe", "none", {"window": [48]}),
            ClassifierArm("finetune", "finetune", "tiny-ct"),
            ClassifierArm("scratch", "scratch", "tiny-ct", {"lr": 0.001}),
        ),
        labels=("10%", "50", "all"), seeds=3, where=("diameter_mm", "6", "12"), control="scratch",
        settings={"roi": "labels", "margin": 5, "covariate": ["age"], "labels": str(tmp_path / "other.csv")},
        device="cuda", gpus=("0", "2"), output=tmp_path / "results",
    )  # fmt: skip


def test_the_settings_of_a_training(bench_of):
    bench = bench_of(settings={"roi": "labels", "margin": 5, "lr": 0.1}, arms={
        "a": {"mode": "finetune", "checkpoint": "tiny-ct", "settings": {"lr": 0.2, "window": [32, 48, 48]}},
        "scratch": None,
    })  # fmt: skip
    made = bench.config(bench.arms[0], "10%", 3)
    assert made == ClassifyConfig(
        mode="finetune", checkpoint="tiny-ct", labelled="10%", seed=3, roi="labels", margin=5, lr=0.2,
        window=(32, 48, 48),
    )  # fmt: skip
    assert bench.config(bench.arms[1], "all", 0).lr == 0.1


def test_the_control_is_the_first_from_random_weights(bench_of):
    arms = {"a": {"mode": "probe", "checkpoint": "tiny-ct"}, "b": PROBE, "scratch": {}}
    assert bench_of(arms=arms).control == "b"
    assert bench_of(arms=arms, control="a").control == "a"
    assert bench_of(arms={"a": arms["a"], "c": arms["a"]}).control == "c"
    assert bench_of(arms={"scratch": {}}).arms[0].checkpoint == "none", "no finetuning whose network it could have"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": []}, "'target' is missing"),
        ({"target": ["ill", "ill"]}, "target: give different ones"),
        ({"datasets": None}, "'datasets' is missing"),
        ({"datasets": {"7": {"folds": [0]}}}, "datasets: 7: unknown entry 'folds': there are configuration"),
        ({"arms": []}, "'arms' is missing"),
        ({"arms": ["mine"]}, "arms: mine: give a mode: probe, finetune or scratch"),
        ({"arms": ["probe"]}, "arms: probe: give a checkpoint, or none for random weights: checkpoint_final"),
        ({"arms": {"a": {"mode": "train"}}}, "arms: a: mode train: give probe, finetune or scratch"),
        ({"arms": {"a b": PROBE}}, "arms: a b: a name has letters, digits and _ only"),
        ({"arms": {"baseline_size": PROBE}}, "does not begin with baseline_"),
        ({"arms": {"a": {"mode": "finetune", "checkpoint": "none"}}}, "arms: a: finetuning needs a checkpoint"),
        ({"arms": {"a": {**PROBE, "trainer": "x"}}}, "arms: a: unknown entry 'trainer'"),
        ({"arms": {"a": {**PROBE, "settings": {"seed": 1}}}}, "arms: a: settings: 'seed' is no .*give the entry seeds"),
        ({"arms": {"a": {**PROBE, "settings": {"mask_channel": True, "roi": "labels"}}}}, "arms: a: mask_channel is"),
        ({"settings": {"labelled": "10%"}}, "settings: 'labelled' is no setting here: give the entry labels"),
        ({"settings": {"margn": 3}}, "unknown setting 'margn' in settings: did you mean 'margin'"),
        ({"settings": {"margin": "wide"}}, "arms: probe_mim: setting 'margin' must be like 10.0"),
        ({"settings": {"margin": -1}}, "arms: probe_mim: margin must be 0 mm or more"),
        ({"settings": 3}, "settings: give names and values"),
        ({"labels": ["ten"]}, "labels takes a number above 0"),
        ({"labels": []}, "labels: give different ones, at least one"),
        ({"labels": ["all", "all"]}, "labels: give different ones"),
        ({"seeds": 0}, "seeds 0: give a whole number from 1"),
        ({"where": ["age", 3]}, "where: give a column and two numbers"),
        ({"control": "b"}, "control b is none of the arms: probe_mim, probe_random"),
        ({"iterations": 100}, "unknown entry 'iterations': there are arms, control"),
        ({"gpus": [0]}, "'gpus' are for device cuda"),
        ({"test": [504]}, "unknown entry 'test'"),
    ],
)
def test_bad_entries_are_named(bench_of, changes, says):
    with pytest.raises(MiMError, match=says):
        bench_of(**changes)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text("target: ill\ndatasets: [7]")
    with pytest.raises(MiMError, match=r"bench\.yaml: 'arms' is missing"):
        read_bench(path)


def test_a_command_line_has_what_is_not_the_default():
    assert flags_of(ClassifyConfig()) == ["--window", "96", "96", "96"], "a probe's window is settled at once"
    config = ClassifyConfig("scratch", roi="labels", mask_channel=True, covariate=("a", "b"), margin=0.5)
    assert flags_of(config) == [
        "--mode", "scratch", "--covariate", "a", "b", "--roi", "labels", "--margin", "0.5", "--mask_channel",
    ]  # fmt: skip
    assert flags_of(DataOptions("7", target=("ill",))) == ["-d", "7", "--target", "ill"]


DOCS = (Path(__file__).parents[4] / "docs" / "classification.md").read_text()


def test_the_table_of_the_documentation_has_every_entry_with_its_default():
    table = DOCS.split("| entry | default | |\n|---|---|---|\n")[1].split("\n\n")[0]
    documented = {}
    for row in table.splitlines():
        name, default = (re.sub("`", "", cell).strip("| ") for cell in row.split(" | ")[:2])
        documented[name] = default
    defaults = {entry.name: entry.default for entry in fields(ClassifierBench)}
    assert set(documented) == set(defaults)
    for name, default in defaults.items():
        if isinstance(default, int | str | Path) or name == "labels":
            written = yaml.safe_load(documented[name])
            assert written == (list(default) if name == "labels" else type(written)(default)), name


def test_the_example_of_the_documentation_is_read(tmp_path):
    (example,) = re.findall("```yaml\n(.*?)```", DOCS, re.DOTALL)
    bench = classifier_bench_of(yaml.safe_load(example), tmp_path)
    assert {arm.mode for arm in bench.arms} == {"probe", "finetune", "scratch"}
    assert bench.control == "probe_random"


def test_errors_of_trainings_name_entries_and_not_flags():
    message = "column is empty: choose another --target, fewer --folds, or run mim_pretrain -d 7 --preset tiny --nope"
    with pytest.raises(MiMError) as error, named_as_entries():
        raise MiMError(message)
    assert str(error.value) == message.replace("--target", "target").replace("--folds", "folds")
