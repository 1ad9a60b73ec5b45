"""`mim_benchmark run` with nnU-Net's real commands: two datasets, two arms, two fractions."""

import json
import shutil
import signal
import subprocess
import time

import pytest

DATASETS = {912: "Dataset912_One", 913: "Dataset913_Two"}
pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
BENCH = """
output: results
datasets: [912, 913]
arms: {MiM: {checkpoint: once.pth}, Scratch: }
labels: [25%, 100%]
seeds: 1
iterations: 2
iterations_per_epoch: 1
val_iterations: 1
device: cpu
jobs: 2
"""


@pytest.fixture(scope="module")
def workplace(workplace_of):
    """Two datasets of five small volumes, planned alike; one pretraining, of one step, on the first one's fold 0."""
    work = workplace_of("bench")
    for number, dataset in DATASETS.items():
        work.write_dataset(dataset, 5, 32)
        work.plan(number)
        work("mim_plan", "-d", number, "--preset", "tiny", "--set", "patch_size=32,32,32", "batch_size=1")
        work("nnUNetv2_preprocess", "-d", number, "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1")
    run = ("--preset", "tiny", "--view", "32", "--iterations", "1", "--batch", "1", "--children", "1", "1")
    work("mim_pretrain", "-d", 912, "-p", "nnUNetMiMPlans", "-f", "0", *run, "-device", "cpu", "--workers", "0")
    (checkpoint,) = work.folder.glob("nnUNet_results/*/*/fold_0/checkpoint_final.pth")
    checkpoint.rename(work.folder / "once.pth")
    (work.folder / "bench.yaml").write_text(BENCH)
    return work


def test_killed_in_the_middle_continued_and_then_nothing_left_to_do(workplace):
    """Both datasets are of the same images, so that the first fold's validation case of the second one is that of the
    first, which the pretraining left out.
    """
    plan = workplace("mim_benchmark", "run", "bench.yaml", "--dry-run")
    assert plan.count(": to do, about ") == 8
    assert "8 of 8 trainings to do, about" in plan
    cells = workplace.folder / "results" / "cells"
    assert not cells.exists()
    bench = workplace.folder / "bench.yaml"
    bench.write_text(BENCH.replace("[25%, 100%]", "[100%]"))
    command = workplace.command("mim_benchmark", "run", bench)
    with subprocess.Popen(command, env=workplace.env, cwd=workplace.folder, stdout=subprocess.DEVNULL) as running:
        end = time.monotonic() + 900
        while not list(cells.rglob("result.json")):
            assert running.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        running.send_signal(signal.SIGKILL)
    stamps = {path: path.stat().st_mtime_ns for path in cells.rglob("result.json")}
    left = 4 - len(stamps)
    assert left > 0
    said = workplace("mim_benchmark", "run", "bench.yaml")
    assert f"4 trainings of 2 iterations: {len(stamps)} finished, {left} to do" in said
    assert said.count(": mean Dice") == left
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "finished ones are kept"
    results = {path: json.loads(path.read_text()) for path in cells.rglob("result.json")}
    assert len(results) == 4
    for path, result in results.items():
        log = (path.parent / "log.txt").read_text()
        assert "Traceback" not in log
        twin = path.parents[1] / "Scratch" / "result.json"
        assert result["key"]["train_cases"] == results[twin]["key"]["train_cases"]
    report = workplace.folder / "results" / "report.html"
    page = report.read_text()
    assert "4 of 4 trainings are finished" in page
    assert page.count("<img") >= 6
    changed = {path: path.stat().st_mtime_ns for path in cells.rglob("*")}
    assert "4 finished, 0 to do" in workplace("mim_benchmark", "run", "bench.yaml")
    assert {path: path.stat().st_mtime_ns for path in cells.rglob("*")} == changed, "a second run does nothing"


def test_a_failed_training_is_named_and_tried_again_on_request(workplace):
    """A reference that is no image makes both validations fail."""
    (workplace.folder / "broken.yaml").write_text(
        BENCH.replace("results", "broken").replace("[912, 913]", "[912]").replace("[25%, 100%]", "[100%]")
    )
    references = workplace.folder / "nnUNet_preprocessed" / DATASETS[912] / "gt_segmentations"
    moved = references.rename(references.with_name("moved"))
    references.mkdir()
    said = workplace("mim_benchmark", "run", "broken.yaml", fails=True)
    assert "a validation case's reference, is missing: run nnUNetv2_preprocess -d 912" in said
    assert not (workplace.folder / "broken").exists(), "before any training"
    for path in moved.iterdir():
        (references / path.name).write_bytes(b"no image")
    said = workplace("mim_benchmark", "run", "broken.yaml", fails=True)
    assert "error: 2 trainings failed, Dataset912_One fold 0, labels 100%, seed 0, " in said
    assert "Traceback" not in said
    shutil.rmtree(references)
    moved.rename(references)
    logs = {path: path.stat().st_mtime_ns for path in (workplace.folder / "broken").rglob("log.txt")}
    assert "error: 2 trainings failed" in workplace("mim_benchmark", "run", "broken.yaml", fails=True), "not on its own"
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    said = workplace("mim_benchmark", "run", "broken.yaml", "--retry")
    assert "0 finished, 2 to do" in said
    assert said.count("mean Dice") == 2


def test_cases_that_the_pretraining_has_seen_are_refused_or_marked(workplace, monkeypatch):
    """Fold 1 validates on a case that the pretraining of fold 0 has trained on, as a copy in another dataset."""
    text = (
        BENCH.replace("results", "leak").replace("[912, 913]", "{913: {folds: [1]}}").replace("[25%, 100%]", "[100%]")
    )
    (workplace.folder / "leak.yaml").write_text(text)
    monkeypatch.chdir(workplace.folder)
    said = workplace.refused("mim_benchmark", "run", "leak.yaml")
    assert "error: the pretraining of arm MiM has seen 1 of the validation cases of Dataset913_Two fold 1" in said
    assert not (workplace.folder / "leak" / "cells").exists(), "before any training"
    said = workplace("mim_benchmark", "run", "leak.yaml", "--allow-seen")
    assert "| 100% (4) | MiM * | 1 |" in said
    assert "MiM *: WARNING: its pretraining has seen 1 of the validation cases of fold 1" in said


def test_a_training_with_the_command_for_nnssl_checkpoints(workplace):
    """Stands in for nnU-Net's development branch: a package that installs its command, here with nnU-Net's own
    training behind it. What is tested is the route: command, trainer and plans.
    """
    text = BENCH.replace("results", "nnssl").replace("[912, 913]", "[912]").replace("[25%, 100%]", "[100%]")
    arm = "{MAE: {nnssl_plans: nnUNetMiMPlans, trainer: nnUNetTrainer}}"
    text = text.replace("{MiM: {checkpoint: once.pth}, Scratch: }", arm)
    (workplace.folder / "nnssl.yaml").write_text(text)
    said = workplace("mim_benchmark", "run", "nnssl.yaml", fails=True)
    assert "arm MAE: nnUNetv2_train_pretrained is not installed" in said
    package = workplace.folder / "branch" / "branch-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: branch\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[console_scripts]\nnnUNetv2_train_pretrained = nnunetv2.run.run_training:run_training_entry\n"
    )
    said = workplace("mim_benchmark", "run", "nnssl.yaml", PYTHONPATH=str(package.parent))
    assert "[1/1] Dataset912_One fold 0, labels 100%, seed 0, MAE: mean Dice" in said
    (result,) = (workplace.folder / "nnssl").rglob("result.json")
    assert json.loads(result.read_text())["key"]["command"] == "nnUNetv2_train_pretrained"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("arms: {MiM: {checkpoint: once.pth}", "arms: {MiM: {checkpoint: gone.pth}"), "arm MiM: "),
        (("[912, 913]", "[912, 999]"), "unknown dataset '999'"),
        (("device: cpu", "device: cuda"), "no GPU was found"),
        (("seeds: 1", "seed: 1"), "unknown entry 'seed'"),
        (
            ("Scratch: }", "Typo: {trainer: nnUNetTrainerTypo, plans: nnUNetMiMPlans}}"),
            "knows no trainer nnUNetTrainerTypo",
        ),
    ],
)
def test_bad_files_before_any_training(workplace, monkeypatch, change, says):
    """Also on a machine with a GPU."""
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (workplace.folder / "bad.yaml").write_text(BENCH.replace("results", "bad").replace(*change))
    said = workplace.refused("mim_benchmark", "run", "bad.yaml", CUDA_VISIBLE_DEVICES="")
    assert says in said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert not (workplace.folder / "bad").exists()
