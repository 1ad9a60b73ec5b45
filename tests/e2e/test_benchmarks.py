"""The benchmark scripts run and print what their readers parse. Sizes are toys: no figure here means anything."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import yaml

from nnunet_mim.demo.phantoms import make_phantom

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOY = ("--preset", "tiny", "--view", "32", "--device", "cpu", "--repeats", "1", "--json")

pytestmark = pytest.mark.long


def last_line(script, *options):
    """The JSON object that a benchmark prints last."""
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_one_level_dense_and_visible_only():
    found = last_line("step_time.py", *TOY, "--batch", "2", "--ratio", "0.6")
    assert found["max_abs_loss_diff"] <= 1e-5
    assert found["speedup"] == pytest.approx(found["dense_s"] / found["visible_s"])
    assert found["encoder_speedup"] > 0
    if "dense_peak_mb" in found:  # needs Linux's /proc
        assert found["peak_ratio"] == pytest.approx(found["visible_peak_mb"] / found["dense_peak_mb"])


@pytest.mark.parametrize("dense", [(), ("--dense",)])
def test_a_whole_crop(dense):
    found = last_line("step_time.py", "--full-crop", *TOY, "--children", "2", "2", *dense)
    assert found["views"] == 7
    assert found["gflop_per_s"] == pytest.approx(found["gflop"] / found["seconds"])
    assert 0 < found["share_of_matrix_rate"] < 1


def test_depthwise_convolution():
    found = last_line("depthwise.py", "--repeats", "1", "--json", "--shapes", "2x4x8")
    assert found["rows"][0]["difference"] < 1e-4


def test_search_for_copies(tmp_path):
    """The two windows have keys of their own: in the narrow one not all copies can be found."""
    folder = tmp_path / "nnUNet_raw" / "Dataset504_HeadNeckOARTest" / "imagesTr"
    folder.mkdir(parents=True)
    for number in range(2):
        image = sitk.GetImageFromArray(make_phantom(number, (40, 44, 48))[0].astype(np.int16))
        image.SetSpacing((4.0, 4.0, 4.0))
        sitk.WriteImage(image, str(folder / f"case{number}_0000.nii.gz"))
    found = last_line("leak_guard.py", "--data", str(tmp_path), "--cases", "2", "--json")
    assert found["copies_of"] == 2
    assert len(found["variants"]) == 17
    assert found["variants"].keys() == found["narrow_window"].keys()
    assert {"24 HU more", "24 HU less", "header spacing"} <= found["variants"].keys()
    assert found["variants"]["one voxel changed by 1 HU"] == 1
    for rates in (found["variants"], found["narrow_window"]):
        assert all(0 <= rate <= 1 for rate in rates.values())


def test_reading_crops():
    options = ("--crop", "32", "--size", "48", "--cases", "2", "--crops", "3", "--repeats", "1", "--json")
    found = last_line("data_throughput.py", *options)
    assert found["fraction_of_raw"] == pytest.approx(
        found["crops_per_s_per_core"] / found["raw_blosc2_crops_per_s_per_core"]
    )
    assert found["loader_crops_per_s_one_worker"] > 0


def test_the_cost_of_the_unet():
    found = last_line("step_time.py", "--full-crop", "--unet", *TOY, "--children", "1", "1")
    assert found["ratio"] == pytest.approx(1 + found["unet_s"] / found["unet_every"] / found["seconds"])
    assert found["unet_s"] > 0


def test_a_finetuning_step():
    options = ("--preset", "tiny", "--patch", "32", "32", "32", "--batch", "1", "--repeats", "1", "--json")
    found = last_line("finetune_step.py", *options)
    assert found["ratio_to_resenc_l"] == pytest.approx(found["mim_s"] / found["resenc_l_s"])
    stem = 2 * 32**3 * 27 * 32  # of the plain network's first convolution, from one channel to 32
    assert found["plain_forward_gflop"] * 1e9 > 10 * stem
    assert found["resenc_l_forward_gflop"] > found["plain_forward_gflop"] > found["mim_forward_gflop"] > 0
    assert found["ratio_to_plain"] == pytest.approx(found["mim_s"] / found["plain_s"])


def test_opening_many_cases():
    found = last_line("many_cases.py", "--counts", "10", "20", "--workers", "1", "--json")
    assert [row["cases"] for row in found["rows"]] == [10] * 3 + [20] * 3
    assert found["start_s"] > 0
    found = last_line("many_cases.py", "--made_up", "--counts", "10", "20", "--workers", "0", "--json")
    assert [row["cases"] for row in found["rows"]] == [10, 20]


@pytest.fixture(scope="module")
def toys(workplace_of):
    """Five made-up cases, planned and preprocessed."""
    work = workplace_of("benchmarks")
    work.write_dataset("Dataset915_Toys", 5, 32)
    work.plan(915)
    fast = ("lr=0.05", "warmup_fraction=0", "foreground_prior=0")  # a step that changes what is predicted
    work("mim_plan", "-d", 915, "--preset", "tiny", "--set", "patch_size=32,32,32", "batch_size=1", *fast)
    work("nnUNetv2_preprocess", "-d", 915, "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1")
    return work


def test_an_ablation_is_run_once(toys):
    """Two variants of one step each; the second call trains nothing."""
    work = toys
    run = ("--preset", "tiny", "--view", "32", "--iterations", "2", "--batch", "1", "--children", "1", "1")
    run = (*run, "-device", "cpu", "--workers", "0", "--val_every", "1")
    command = [sys.executable, BENCHMARKS / "ablation.py", "-d", "915", "-f", "0", "--only", "default", "cosine"]
    command += ["--json", "--", *run]
    stamps = set()
    for _ in range(2):
        done = subprocess.run(command, env=work.env, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
        rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
        assert [row["variant"] for row in rows] == ["default", "cosine"]
        assert all(row["rank"] > 0 for row in rows)
        assert all(row["crops_per_s"] > 0 for row in rows)
        runs = work.folder.glob("nnUNet_results/*/MiMPretrain_ablation_*/fold_0/checkpoint_final.pth")
        stamps.add(tuple(path.stat().st_mtime_ns for path in sorted(runs)))
    assert len(stamps) == 1
    assert len(next(iter(stamps))) == 2


def test_the_decoders_experiment_is_run_once(toys):
    """A U-Net is transferred where it learnt, and nowhere else; the second call trains nothing."""
    run = ("--preset", "tiny", "--view", "32", "--iterations", "2", "--batch", "1", "--children", "1", "1")
    run = (*run, "--workers", "0", "--val_every", "1")
    output = toys.folder / "decoder"
    command = [sys.executable, BENCHMARKS / "decoder_experiment.py", "-d", "915", "-f", "0", "--labels", "2"]
    command += ["--seeds", "1", "--finetune_iterations", "2", "--output", output, "--", *run]
    stamps = set()
    for _ in range(2):
        done = subprocess.run(command, env=toys.env, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
        transfers = sorted(output.rglob("mim_transfer.json"))
        stamps.add(tuple(path.stat().st_mtime_ns for path in transfers))
    assert len(stamps) == 1
    with (output / "results" / "table.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"Encoder", "Together", "Phase", "Scratch"}
    fresh = [{name.split(".")[1] for name in json.loads(path.read_text())["fresh"]} for path in transfers]
    assert sorted(parts == {"heads"} for parts in fresh) == [False, True, True]


def test_an_interrupted_variant_goes_on_though_it_overrides_an_argument(toys):
    run = ("--preset", "tiny", "--view", "32", "--scale", "1", "2", "2", "--iterations", "8", "--batch", "1")
    run = (*run, "--children", "1", "1", "-device", "cpu", "--workers", "0", "--val_every", "8", "--save_every", "1")
    command = [sys.executable, BENCHMARKS / "ablation.py", "-d", "915", "-f", "0", "--only", "scale_1", "--", *run]
    folder = toys.folder / "nnUNet_results"
    first = subprocess.Popen(command, env=toys.env, stderr=subprocess.DEVNULL, start_new_session=True)
    until(lambda: list(folder.glob("*/MiMPretrain_ablation_scale_1__*/fold_0/checkpoint_latest.pth")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, env=toys.env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| scale_1 |" in done.stdout
    (final,) = folder.glob("*/MiMPretrain_ablation_scale_1__*/fold_0/checkpoint_final.pth")
    assert yaml.safe_load((final.parent / "config.yaml").read_text())["scale"] == [1, 1, 1]


def until(condition, process, seconds=120):
    """Wait for it while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def test_averages_of_weights_are_validated(toys):
    """With decay 0 the average is the last step's weights; with 1, the first step's."""
    command = [sys.executable, BENCHMARKS / "ema.py", "-d", "915", "-tr", "nnUNetTrainerMiMScratch"]
    command += ["--iterations", "3", "--decays", "0", "1", "-o", toys.folder / "ema", "--json"]
    done = subprocess.run(command, env=toys.env, capture_output=True, encoding="utf-8", cwd=toys.folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    none, last, first = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    assert [none["decay"], last["decay"], first["decay"]] == ["none", 0, 1]
    assert last["labels"] == none["labels"]
    assert first["labels"] != none["labels"]
    validations = [toys.folder / "ema" / f"decay_{decay}" / "validation" for decay in ("none", "0.0", "1.0")]
    predicted = [sorted(path.glob("*.nii.gz"))[0].read_bytes() for path in validations]
    assert predicted[0] == predicted[1] != predicted[2]


def test_learning_curves_have_the_same_batches(toys):
    """Equal where the recipe is; another recipe has the same length and another loss, bfloat16 nearly the same one."""
    command = [sys.executable, BENCHMARKS / "finetune_curve.py", "-d", "915", "-tr", "nnUNetTrainerMiMScratch"]
    command += ["--iterations", "2", "--val_iterations", "1", "--json", "--set", "lr=0.01"]
    curves = []
    for settings in ([], ["--autocast", "float32"], ["foreground_prior=0.04"], ["--autocast", "bfloat16"]):
        done = subprocess.run([*command, *settings], env=toys.env, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        curves.append(json.loads(done.stdout.strip().splitlines()[-1])["rows"])
    assert curves[0] == curves[1]
    assert [row["iterations"] for row in curves[2]] == [row["iterations"] for row in curves[0]] == [2]
    losses = [rows[0]["loss"] for rows in curves]
    assert losses[2] != losses[0]
    assert losses[3] != losses[0]
    assert losses[3] == pytest.approx(losses[0], rel=0.02)


ON_A_CPU = {
    "DEVICE": "cpu", "PRESET": "tiny", "LABELS": "2", "SEEDS": "1", "JOBS": "2", "PROCESSES": "1",
    "PRETRAINING": "--view 32 --iterations 1 --batch 1 --children 1 1 --workers 0",
    "LENGTH": "--iterations 1 --iterations_per_epoch 1 --val_iterations 1",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "nnUNet_n_proc_DA": "1",
}  # fmt: skip


def test_the_few_shot_experiment_of_the_gpu_without_one(toys):
    """Every arm is planned, trained for a step and reported; stock networks have MiM's spacing, patch and batch."""
    out = toys.folder / "few_shot"
    command = ["bash", str(BENCHMARKS / "gpu" / "few_shot.sh"), "915", "", str(out)]
    for said in ("6 trainings of 1 iterations: 0 finished, 6 to do", "6 finished, 0 to do"):  # and once more
        done = subprocess.run(command, env={**toys.env, **ON_A_CPU}, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert said in done.stdout
    with (out / "table.csv").open() as file:
        arms = {row["arm"] for row in csv.DictReader(file)}
    assert arms == {"MiM", "Scratch", "ScratchNarrow", "nnUNet", "nnUNetNoMirror", "ResEncLNoMirror"}
    folder = toys.folder / "nnUNet_preprocessed" / "Dataset915_Toys"
    names = ("nnUNetMiMPlans", "nnUNetPlainLikeMiM", "nnUNetResEncLLikeMiM", "nnUNetMiMFewShotNarrow_tiny")
    plans = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    configurations = [p["configurations"]["3d_fullres"] for p in plans.values()]
    for key in ("spacing", "patch_size", "batch_size"):
        assert all(c[key] == configurations[0][key] for c in configurations)
    window = "foreground_intensity_properties_per_channel"
    assert plans["nnUNetMiMFewShotNarrow_tiny"][window] == plans["nnUNetPlainLikeMiM"][window]
    assert plans["nnUNetMiMPlans"][window] != plans["nnUNetPlainLikeMiM"][window]


def test_the_ablation_of_the_gpu_without_one(toys):
    """Every variant is finetuned from its own checkpoint, that of the narrow window with the narrow plans."""
    window = ("ct_window=-103,164", "patch_size=32,32,32", "batch_size=1")
    toys("mim_plan", "-d", 915, "--preset", "tiny", "-o", "nnUNetMiMNarrow", "--set", *window)
    toys("nnUNetv2_preprocess", "-d", 915, "-plans_name", "nnUNetMiMNarrow", "-c", "3d_fullres", "-np", "1")
    out = toys.folder / "gpu_ablation"
    command = ["bash", str(BENCHMARKS / "gpu" / "ablation.sh"), "915", "", str(out)]
    settings = {**ON_A_CPU, "VARIANTS": "one_level", "NARROW": "nnUNetMiMNarrow"}
    too_many = {**toys.env, **settings, "LABELS": "99"}
    refused = subprocess.run(command, env=too_many, capture_output=True, encoding="utf-8")
    assert refused.returncode != 0
    assert "] pretraining" not in refused.stdout  # what the protocol refuses is refused before hours of work
    for said in ("4 trainings of 1 iterations: 0 finished, 4 to do", "4 finished, 0 to do"):  # and once more
        done = subprocess.run(command, env={**toys.env, **settings}, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert said in done.stdout
    variants = [line.split("|")[1].strip() for line in (out / "probe.md").read_text().splitlines()[2:]]
    assert variants == ["one_level", "narrow_window"]
    started_from = {}
    for path in out.glob("cells/*/*/*/*/*/result.json"):
        key = json.loads(path.read_text())["key"]
        started_from[path.parent.name] = (key["plans"], Path(key["checkpoint"] or "").parent.parent.name)
    tag, narrow = started_from["one_level"][1].split("_one_level__")[0], "nnUNetMiMAblationNarrow_tiny"
    assert started_from == {
        "Scratch": ("nnUNetMiMFewShot_tiny", ""),
        "ScratchNarrow": (narrow, ""),
        "one_level": ("nnUNetMiMFewShot_tiny", f"{tag}_one_level__nnUNetMiMFewShot_tiny__3d_fullres"),
        "narrow_window": (narrow, f"{tag}_narrow_window__{narrow}__3d_fullres"),
    }


def test_gpu_paths_without_a_gpu():
    options = ("--device", "cpu", "--modes", "eager", "--presets", "tiny", "--view", "32", "--batch", "1")
    found = last_line("gpu/gpu_paths.py", *options, "--steps", "1", "--json")
    assert {check["precision"] for check in found["checks"]} == {"float64", "float32", "bf16"}
    assert all(check["within_bounds"] for check in found["checks"])
    assert {row["convolution"] for row in found["rows"]} == {"torch", "triton"}


def test_islands_of_a_known_case(tmp_path, monkeypatch):
    """An organ of 8 voxels, of which 5 are found in two pieces of 4 and 1, and an island of 2 voxels elsewhere."""
    truth, predicted = np.zeros((2, 4, 4, 8), dtype=np.uint8)
    truth[0, 0, :8] = 1
    predicted[0, 0, :4] = predicted[0, 0, 7] = predicted[3, 3, 6:] = 1
    references = tmp_path / "Dataset915_Toy" / "gt_segmentations"
    validation = tmp_path / "out/cells/Dataset915_Toy/fold_0/labels_5/seed_1/MiM/results/fold_0/validation"
    for folder, image in ((references, truth), (validation, predicted)):
        folder.mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(image), folder / "a.nii.gz")
    summary = {"metric_per_case": [{"prediction_file": "elsewhere/a.nii.gz", "metrics": {"1": {}}}], "mean": {}}
    (validation / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (row,) = last_line("islands.py", "-d", "915", str(tmp_path / "out"), "--json")["rows"]
    assert (row["output"], row["labels"], row["arm"], row["seeds"]) == ("out", "5", "MiM", 1)
    assert row["dice"] == pytest.approx([2 * 5 / (7 + 8)])
    assert row["largest"] == pytest.approx([2 * 4 / (4 + 8)])
    assert row["islands"] == pytest.approx([2 / 8])


def test_a_slab_of_a_validation_case_is_found(tmp_path, monkeypatch):
    """Case b is held out; another dataset has four of its slices, turned over, and a case of its own."""
    random = np.random.default_rng(0)
    volumes = {name: random.integers(-1000, 1000, (10, 40, 40)).astype(np.int16) for name in "abc"}
    for dataset, cases in (("Dataset001_A", {n: volumes[n] for n in "ab"}), ("Dataset002_B", {"c": volumes["c"]})):
        write_raw(tmp_path / "raw" / dataset, cases)
    slab = sitk.DICOMOrient(sitk.GetImageFromArray(volumes["b"][3:7]), "RAI")
    sitk.WriteImage(slab, tmp_path / "raw" / "Dataset002_B" / "imagesTr" / "d_0000.nii.gz")
    (tmp_path / "pre" / "Dataset001_A").mkdir(parents=True)
    (tmp_path / "pre" / "Dataset001_A" / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    found = last_line("shared_slices.py", "-d", "1", "-f", "0", "1", "2", "--json")
    assert (found["held_out"], found["slices"], found["compared_with"]) == (1, 10, 3)
    assert found["shared"] == {"Dataset002_B d and b": 4}


def test_slices_are_compared_before_any_training_has_written_the_split(toys, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, toys.env[name])
    split = toys.folder / "nnUNet_preprocessed" / "Dataset915_Toys" / "splits_final.json"
    split.unlink(missing_ok=True)  # nnU-Net writes the same again
    found = last_line("shared_slices.py", "-d", "915", "-f", "0", "915", "--json")
    assert (found["held_out"], found["compared_with"], found["shared"]) == (1, 4, {})
    assert found["slices"] > 0


def write_raw(folder, cases):
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))
    for name, voxels in cases.items():
        sitk.WriteImage(sitk.GetImageFromArray(voxels), folder / "imagesTr" / f"{name}_0000.nii.gz")
