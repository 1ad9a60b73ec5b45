"""The few-shot protocol with nnU-Net's real commands, on a few small volumes and trainings of four steps."""

import csv
import json
import subprocess

import pytest
import SimpleITK as sitk
import torch

DATASET, TEST = "Dataset908_Few", "Dataset909_FewTest"
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def workplace(workplace_of):
    """Five small volumes, planned and preprocessed for the smallest network, and pretrained for one step."""
    work = workplace_of("few_shot")
    work.write_dataset(DATASET, 5, 32)
    work.plan(908)
    work("mim_plan", "-d", "908", "--preset", "tiny", "--set", "patch_size=32,32,32", "batch_size=1")
    work("nnUNetv2_preprocess", "-d", "908", "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1")
    run = ("--preset", "tiny", "--view", "32", "--iterations", "1", "--batch", "1", "--children", "1", "1")
    work("mim_pretrain", "-d", "908", "-p", "nnUNetMiMPlans", "-f", "0", *run, "-device", "cpu", "--workers", "0")
    return work


SHORT = (
    "few_shot", "-d", "908", "--labels", "2", "all", "--seeds", "1", "--iterations", "4", "--iterations_per_epoch", "2",
    "--val_iterations", "1", "-device", "cpu",
)  # fmt: skip


def protocol(work, *arguments):
    """Run it. Returns what it printed."""
    command = [*work.command("mim_benchmark"), *SHORT, *arguments]
    done = subprocess.run(command, env=work.env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def refused(work, *arguments):
    return work.refused("mim_benchmark", *SHORT, *arguments)


def test_trained_once_reported_and_resumed(workplace):
    output = workplace.folder / "nnUNet_results" / DATASET / "few_shot__nnUNetMiMPlans__3d_fullres__fold_0"
    said = protocol(workplace)
    assert "4 trainings of 4 iterations: 0 finished, 4 to do" in said
    assert f"no stock arm: nnUNetPlans of {DATASET} have not been preprocessed" in said
    cells = {
        (p.parts[-4].removeprefix("labels_"), p.parts[-2]): p
        for p in output.glob(f"cells/{DATASET}/fold_0/labels_*/seed_0/*/result.json")
    }
    assert set(cells) == {("2", "MiM"), ("2", "Scratch"), ("all", "MiM"), ("all", "Scratch")}
    results = {place: json.loads(path.read_text()) for place, path in cells.items()}
    for (labels, arm), result in results.items():
        assert len(result["key"]["train_cases"]) == (2 if labels == "2" else 4)
        assert result["key"]["train_cases"] == results[labels, "MiM"]["key"]["train_cases"], "the same for all arms"
        assert set(result["cases"]) == set(result["key"]["val_cases"])
        assert len(result["curve"]) == 2
        assert bool(result["key"]["checkpoint"]) == (arm == "MiM")
        fold = next(cells[labels, arm].parent.glob("nnUNet_results/*/*/fold_0"))
        summary = json.loads((fold / "validation" / "summary.json").read_text())
        for entry in summary["metric_per_case"]:
            case = entry["prediction_file"].split("/")[-1].removesuffix(".nii.gz")
            assert result["cases"][case]["1"]["dice"] == pytest.approx(entry["metrics"]["1"]["Dice"], nan_ok=True)
        assert result["cost"]["seconds"] > 0
        assert 1e6 < result["cost"]["parameters"] < 100e6
    assert set(results["2", "MiM"]["key"]["train_cases"]) < set(results["all", "MiM"]["key"]["train_cases"]), "nested"
    for name in ("bench.yaml", "table.md", "table.csv", "table.tex", f"figure_{DATASET}.png", "report.html"):
        assert (output / name).stat().st_size > 100
    assert (output / "table.md").read_text() in said
    rows = list(csv.DictReader((output / "table.csv").open()))
    assert len(rows) == 4  # one validation case, one label
    # a training that was interrupted before its validation goes on there; the others are not touched
    stamps = {place: path.stat().st_mtime_ns for place, path in cells.items()}
    cells["all", "Scratch"].unlink()
    assert "4 trainings of 4 iterations: 3 finished, 1 to do" in protocol(workplace)
    changed = {place for place, path in cells.items() if path.stat().st_mtime_ns != stamps[place]}
    assert changed == {("all", "Scratch")}
    # one that was interrupted in its second epoch trains that epoch again, and nothing else
    place = cells["all", "Scratch"]
    (final,) = place.parent.glob("nnUNet_results/*/*/fold_0/checkpoint_final.pth")
    stored = torch.load(final, map_location="cpu", weights_only=False)
    stored["current_epoch"] = 1
    stored["logging"] = {name: values[:1] for name, values in stored["logging"].items()}
    torch.save(stored, final.with_name("checkpoint_latest.pth"))
    final.unlink()
    place.unlink()
    assert "[4/4] " in protocol(workplace)
    log = (place.parent / "log.txt").read_text()
    assert (log.count("Epoch 0"), log.count("Epoch 1")) == (1, 2)
    curve = json.loads(place.read_text())["curve"]
    assert (len(curve), curve[0]) == (2, results["all", "Scratch"]["curve"][0])
    assert protocol(workplace, "--dry-run").count("finished, about ") == 4
    said = workplace("mim_benchmark", "run", output / "bench.yaml")
    assert "4 trainings of 4 iterations: 4 finished, 0 to do" in said
    kept = (output / "bench.yaml").read_text()
    assert "another experiment (length" in refused(workplace, "--iterations", "6")
    assert "another experiment (settings" in refused(workplace, "--set", "lr=0.1")
    assert (output / "bench.yaml").read_text() == kept, "what was refused is not kept"


def test_a_test_set_is_predicted_by_finished_trainings(workplace):
    """Dice of every case against the label image, computed anew; nothing is trained again."""
    output = workplace.folder / "with_test"
    arms = ("--labels", "2", "--arms", "Scratch", "-o", str(output))
    protocol(workplace, *arms)
    workplace.write_dataset(TEST, 7, 32)  # the first five are images of the training data
    assert f"{TEST} case_0 is the same image as {DATASET} case_0" in refused(workplace, *arms, "--test", "909")
    raw = workplace.folder / "nnUNet_raw" / TEST
    for i in range(5):
        (raw / "imagesTr" / f"case_{i}_0000.nii.gz").unlink()
    said = protocol(workplace, *arms, "--test", "909")
    assert "1 trainings of 4 iterations: 0 finished, 1 to do" in said
    assert f"## {TEST}, trained on {DATASET}, fold 0, 2 test cases" in said.replace("\\", "")
    (cell,) = output.glob("cells/*/*/*/*/*/result.json")
    assert (cell.parent / "log.txt").read_text().count("Epoch 0") == 1
    tested = json.loads(cell.read_text())["tests"][TEST]
    assert set(tested) == {"case_5", "case_6"}
    for case, found in tested.items():
        files = (cell.parent / "test" / TEST / "predictions" / f"{case}.nii.gz", raw / "labelsTr" / f"{case}.nii.gz")
        ours, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) == 1 for file in files)
        total = int(ours.sum() + truth.sum())
        assert found["1"]["dice"] == pytest.approx(2 * int((ours & truth).sum()) / total)
    assert len(list(csv.DictReader((output / f"test_{TEST}.csv").open()))) == 2
    assert "1 finished, 0 to do" in protocol(workplace, *arms, "--test", "909")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--labels", "5"], "labels 5: give numbers from 1 to 4"),
        (["--arms", "MiM", "Nothing"], "--arms Nothing: give MiM, Scratch, nnUNet"),
        (["--arms", "Mine=nnUNetTrainer:NoPlans"], "no plans 'NoPlans'"),
        (["--set", "no_such=1"], "unknown setting 'no_such'"),
        (["--arms", "A=nnUNetTrainer:nnUNetMiMPlans", "--set", "lr=1"], "--set lr: no MiM arm for it"),
        (["--fold", "9"], "fold 9"),
        (["--arms", "A=nnUNetTrainerMiM:nnUNetMiMPlans:/gone.pth"], "/gone.pth does not exist"),
        (["--arms", "A=nnUNetTrainer:nnUNetMiMPlans:/gone.pth"], "/gone.pth does not exist"),
        (["--arms", "A=nnUNetTrainerMiMScratch:nnUNetMiMPlans:x.pth"], "starts from random weights"),
        (["--iterations", "3"], "iterations (3) must be a multiple of iterations_per_epoch (2)"),
        (["--iterations_per_epoch", "0"], "iterations_per_epoch 0: give a whole number from 1"),
        (["--report", "-o", "nowhere"], "nowhere is finished, so there is nothing to report"),
    ],
)
def test_bad_arguments_before_any_training(workplace, arguments, says):
    said = refused(workplace, *arguments)
    assert says in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == said.strip().splitlines()[-1:]
    assert "Traceback" not in said


def test_a_stock_arm_trains_with_the_same_length(workplace):
    workplace("nnUNetv2_preprocess", "-d", "908", "-c", "3d_fullres", "-np", "1")
    said = protocol(workplace, "--dry-run", "-o", str(workplace.folder / "dry"))
    assert "6 of 6 trainings to do" in said, "MiM, Scratch and nnUNet, now that its data is there"
    output = workplace.folder / "stock"
    said = protocol(workplace, "--labels", "2", "--arms", "nnUNet", "-o", str(output))
    assert "1 trainings of 4 iterations: 0 finished, 1 to do" in said
    log = (output / "cells" / DATASET / "fold_0" / "labels_2" / "seed_0" / "nnUNet" / "log.txt").read_text()
    assert "Epoch 1" in log
    assert "Epoch 2" not in log
