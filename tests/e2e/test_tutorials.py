"""The commands of the tutorials, block by block as they stand there, on real CT, small and short."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nnunet_mim

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
RECIPE = "num_epochs=1 iterations_per_epoch=2 val_iterations_per_epoch=1 patch_size=32,32,32"
SHORT = {
    "mim_prepare": "-np 1 --preset tiny",
    "mim_plan": f"--set {RECIPE}",
    "mim_pretrain": "--view 32 --iterations 2 --children 1 1 -device cpu --workers 0",
    "mim_benchmark": "-device cpu",
    "mim_classify train": "-device cpu",
    "mim_classify predict": "-device cpu",
    "nnUNetv2_preprocess": "-np 1",
    "nnUNetv2_train": "-device cpu",
    "nnUNetv2_predict": "-device cpu -npp 1 -nps 1",
}
"""what is added to each of these commands: lengths, sizes and the device, nothing else"""
SHIPPED = Path(nnunet_mim.__file__).parent / "weights" / "tiny-ct"
"""a folder of `mim_export`, which stands for a name on Hugging Face"""

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def blocks_of(tutorial):
    """The shell blocks of a tutorial."""
    blocks = re.findall(r"```bash\n(.*?)```", (TUTORIALS / tutorial).read_text(), re.DOTALL)
    assert blocks, tutorial
    return blocks


def shortened(block):
    """A block with what `SHORT` adds to its commands."""
    lines = []
    for line in block.splitlines():
        command = line.split("  #")[0].rstrip()
        flags = next((flags for name, flags in SHORT.items() if command.startswith(name)), "")
        lines.append(f"{command} {flags}")
    return "\n".join(lines)


def run_tutorial(work, tutorial, places):
    """Run all blocks in a shell that stops at the first failure. Returns what each printed.

    `places` maps a text of the tutorial that stands for something of the user to what it is here. Each must occur.
    """
    blocks = blocks_of(tutorial)
    assert not [text for text in places if text not in "".join(blocks)], "a substitution without use"
    path = f"{Path(sys.executable).parent}{os.pathsep}{work.env['PATH']}"
    printed = []
    for block in blocks:
        for text, place in places.items():
            block = block.replace(text, str(place))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shortened(block)], env={**work.env, "PATH": path},
            cwd=work.folder, capture_output=True, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == 0, f"{tutorial}:\n{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    return printed


def test_few_labels(workplace_of):
    work = workplace_of("few_labels")
    work.write_dataset("Dataset501_HeadNeckOAR", 5, 40)
    places = {
        " --set num_epochs=50": "", "--labels 5 10 all": "--labels 2 3 all",
        "IMAGES": work.folder / "new", "PREDICTIONS": work.folder / "predictions",
    }  # fmt: skip
    first, _, measured, _ = run_tutorial(work, "few_labels.md", places)
    assert "Pretrained weights: tiny-ct" in first
    assert "MiM" in measured
    results = work.folder / "nnUNet_results" / "Dataset501_HeadNeckOAR"
    assert len(list(results.glob("nnUNetTrainerMiM*/fold_0/validation/summary.json"))) == 2
    assert (work.folder / "predictions" / "new_1.nii.gz").is_file()


def test_hospital(workplace_of, write_series, shared_data):
    import SimpleITK as sitk

    work = workplace_of("hospital")
    work.write_dataset("Dataset501_HeadNeckOAR", 5, 40)
    export = work.folder / "export"
    for number, name in enumerate(("okbp_tr_001", "okbp_va_202", "crlm_1006", "ts_aorta")):
        image = sitk.Cast(sitk.ReadImage(str(shared_data / "unlabeled" / f"{name}.nii.gz")), sitk.sitkInt16)
        write_series(image, export / f"patient_{17 + number}")
    (export / "patient_17" / "report.txt").write_text("no image")
    places = {"/data/export": export, "mim_prepare -d 800": "mim_prepare -d 800 -s 4"}
    prepared, _, pretrained, looked, finetuned = run_tutorial(work, "hospital.md", places)
    assert "4 cases prepared, 0 left out" in prepared
    assert "next: nnUNetv2_train" in pretrained
    (run,) = work.folder.glob("nnUNet_results/Dataset800_Export/MiMPretrain__nnUNetMiMPlans__3d_fullres/fold_all")
    assert (run / "report.html").is_file()
    assert "NIfTI files" in looked
    assert (work.folder / "looks" / "report.html").is_file()
    assert "Pretrained weights: " in finetuned
    assert "PRETRAINED ON" not in finetuned


def test_published(workplace_of, golden_folder, reference):
    work = workplace_of("published")
    work.write_dataset("Dataset501_HeadNeckOAR", 5, 40)
    shapes = json.loads((golden_folder / "published_keys.json").read_text())
    torch.save(reference.golden.checkpoint(shapes, reference.network.sincos), work.folder / "PUBLISHED.pth")
    looked, converted, finetuned, pretrained = run_tutorial(work, "published.md", {"USER/my_encoder": SHIPPED})
    assert "trained on" in looked
    assert "361 converted" in converted
    assert "Pretrained weights: " in finetuned
    assert "next: nnUNetv2_train" in pretrained


def test_classification(workplace_of, shared_data):
    """Thirty nodules of as many patients, half of them malignant."""
    work = workplace_of("classification")
    source, raw = (place / "nnUNet_raw" / "Dataset503_LIDCNodule" for place in (shared_data, work.folder))
    rows = list(csv.DictReader((source / "labels.csv").open()))
    by_patient = {row["patient"]: row for row in rows if row["malignant"] and row["diameter_mm"]}
    chosen = [row for wanted in "01" for row in [r for r in by_patient.values() if r["malignant"] == wanted][:15]]
    for folder in ("imagesTr", "labelsTr", "new", "masks"):
        (raw / folder).mkdir(parents=True) if folder.endswith("Tr") else (work.folder / folder).mkdir()
    for row in chosen:
        shutil.copy(source / "imagesTr" / f"{row['case']}_0000.nii.gz", raw / "imagesTr")
        shutil.copy(source / "labelsTr" / f"{row['case']}.nii.gz", raw / "labelsTr")
    shutil.copy(raw / "imagesTr" / f"{chosen[0]['case']}_0000.nii.gz", work.folder / "new")
    shutil.copy(raw / "labelsTr" / f"{chosen[0]['case']}.nii.gz", work.folder / "masks")
    with (raw / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(chosen[0]))
        writer.writeheader()
        writer.writerows(chosen)
    content = json.loads((source / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": len(chosen)}))
    places = {
        "--mode finetune": "--mode finetune --workers 0 --epochs 1 --window 32 32 32",
        "--mode scratch": "--mode scratch --workers 0 --epochs 1 --window 32 32 32",
        "IMAGES": work.folder / "new", "MASKS": work.folder / "masks",
    }  # fmt: skip
    run_tutorial(work, "classification.md", places)
    table = list(csv.DictReader((work.folder / "out.csv").open()))
    assert [row["case"] for row in table] == [chosen[0]["case"]]
    (results,) = work.folder.glob("nnUNet_results/*/mim_classify__nnUNetMiMPlans__3d_fullres/malignant")
    arms = {path.name for path in results.iterdir() if path.is_dir()}
    assert {"probe", "probe_random", "finetune", "scratch", "baseline_size"} <= arms
    assert (results / "report.html").is_file()
