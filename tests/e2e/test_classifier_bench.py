"""An experiment of classifiers with the real commands, on small made-up lesions."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
import yaml

DATASET = "Dataset912_Lesions"
N_CASES = 40
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def workplace(workplace_of):
    """Balls of two patients' cases each, brighter where they are ill; planned and preprocessed for a small network."""
    work = workplace_of("classifiers")
    raw = work.folder / "nnUNet_raw" / DATASET
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    rows = [["case", "patient", "ill", "size"]]
    for number in range(N_CASES):
        rng, ill = np.random.default_rng(number), number % 3 == 0
        grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
        ball = ((grid - rng.integers(10, 14, (3, 1, 1, 1))) ** 2).sum(0) < rng.integers(4, 7) ** 2
        voxels = rng.normal(-800, 60, ball.shape) + ball * rng.normal(900 if ill else 700, 100)
        name = f"case_{number:02d}"
        sitk.WriteImage(sitk.GetImageFromArray(voxels.astype(np.int16)), raw / "imagesTr" / f"{name}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(ball.astype(np.uint8)), raw / "labelsTr" / f"{name}.nii.gz")
        rows.append([name, f"patient_{number // 2}", int(ill), int(ball.sum())])
    with (raw / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    labels = {"background": 0, "ball": 1}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": N_CASES, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(content))
    work.plan(912)
    work("mim_plan", "-d", "912", "--preset", "tiny", "--set", "patch_size=32,32,32", "batch_size=1")
    work("nnUNetv2_preprocess", "-d", "912", "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1")
    return work


def test_trained_reported_interrupted_and_resumed(workplace):
    bench = workplace.folder / "bench.yaml"
    content = {
        "target": "ill", "datasets": [912], "plans": "nnUNetMiMPlans", "device": "cpu", "labels": ["50%", "all"],
        "arms": {
            "probe_mim": {"mode": "probe", "checkpoint": "tiny-ct"},
            "probe_random": {"mode": "probe", "checkpoint": "none"},
            "scratch": {"settings": {"epochs": 1, "window": 24}},
        },
        "settings": {"roi": "labels", "margin": 3, "folds": 2}, "output": "results",
    }  # fmt: skip
    bench.write_text(yaml.safe_dump(content))
    assert "6 of 6 trainings to do, hours unknown" in workplace("mim_benchmark", "run", bench, "--dry-run")
    said = workplace("mim_benchmark", "run", bench)
    assert "6 trainings of all folds: 0 finished, 6 to do" in said
    output = workplace.folder / "results"
    results = {p.parent.name + p.parts[-4]: json.loads(p.read_text()) for p in output.glob("cells/*/*/*/*/result.json")}
    assert set(results) == {f"{arm}labels_{n}" for arm in content["arms"] for n in ("50pct", "all")}
    assert all(0 <= result["auroc"]["ill"] <= 1 and result["seconds"] > 0 for result in results.values())
    assert results["probe_randomlabels_all"]["auroc"]["ill"] > 0.8, "brightness is what random features see too"
    rows = list(csv.DictReader((output / "table.csv").open()))
    names = {row["classifier"] for row in rows}
    assert names == {*content["arms"], "baseline_prevalence", "baseline_size", "baseline_size_hu"}
    assert len(rows) == 2 * len(names)
    for row in rows:
        if row["classifier"] in content["arms"]:
            key = f"{row['classifier']}labels_{row['labels'].replace('%', 'pct')}"
            assert float(row["auroc"]) == pytest.approx(results[key]["auroc"]["ill"], abs=1e-5)
    assert (output / "table.md").read_text() in said
    assert "Everything is finished." in (output / "report.html").read_text()
    # what was interrupted goes on: one fold of a network is missing, and the other is not trained again
    (cell,) = output.glob("cells/*/labels_all/seed_0/scratch")
    folds = sorted(cell.glob("nnUNet_results/*/*/ill/scratch/fold_*"))
    stamp = (folds[0] / "model.safetensors").stat().st_mtime_ns
    (folds[1] / "predictions.csv").unlink()
    (cell / "result.json").unlink()
    assert "5 finished, 1 to do" in workplace("mim_benchmark", "run", bench)
    assert (folds[0] / "model.safetensors").stat().st_mtime_ns == stamp
    assert (folds[1] / "predictions.csv").is_file()
    assert json.loads((cell / "result.json").read_text())["auroc"].keys() == {"ill"}
    content["labels"] = ["2", "all"]
    bench.write_text(yaml.safe_dump(content))
    assert "labels 2: " in workplace.refused("mim_benchmark", "run", bench)
