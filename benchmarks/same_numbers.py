"""Whether this code computes what another commit computed, bit for bit.

    python benchmarks/same_numbers.py --against COMMIT

Both trees run the same two trainings on made-up cases, with one thread on the CPU: a pretraining of three levels on two
datasets, stopped by a signal in the middle and continued with --c, and a finetuning of its encoder through nnU-Net.
Compared are the texts of train.csv and val.csv, the history in the checkpoint, the loss of every finetuning iteration
and every tensor of the final checkpoints. Ends with exit code 1 and the first difference where there is one.

Nothing here knows how the package is laid out: commands are found through the tree's pyproject.toml, trainers by
nnU-Net.
"""

import argparse
import csv
import hashlib
import importlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LABELLED, UNLABELLED = "Dataset901_Labelled", "Dataset902_Images"
DATASETS = {LABELLED: 5, UNLABELLED: 8}
"""numbers of cases"""
PLANS, CONFIGURATION = "nnUNetPlans", "3d_fullres"
SPACING, SHAPE = (3.0, 2.5, 2.5), (60, 68, 72)
HU_PER_UNIT = 250
WINDOW = {
    "percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0, "min": -1000.0, "max": 1000.0,
    "median": 0.0,
}  # fmt: skip
ITERATIONS, STOP_AFTER = 30, 16
NETWORK = ("network.depths=1,1,1,3", "network.decoder_embed_dim=96", "network.decoder_depth=2")
PRETRAINING = (
    "-d", "901", "902", "-p", PLANS, "-f", "0", "-device", "cpu", "--preset", "tiny", "--view", "32", "--batch", "2",
    "--iterations", str(ITERATIONS), "--workers", "0", "--seed", "7",
    "--set", *NETWORK, "val_every=10", "save_every=3", "val_crops=4", "probe_every=10",
)  # fmt: skip
FINETUNING = {
    "num_epochs": 2, "iterations_per_epoch": 5, "val_iterations_per_epoch": 1, "warmup_fraction": 0.3,
    "layer_decay": 0.9,
}  # fmt: skip
TIMES = ("crops_per_s",)
"""columns that no two runs have alike"""


def main():
    if sys.argv[1:2] == ["child"]:
        children = {"stopping": run_stopping, "finetuning": run_finetuning}
        sys.exit(children[sys.argv[2]](sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="whose figures this tree has to have")
    parser.add_argument("--json", action="store_true", help="print the figures of both, and the difference")
    options = parser.parse_args()
    with worktree(options.against) as other:
        figures = []
        for tree in (other, ROOT):
            with tempfile.TemporaryDirectory() as folder:
                figures.append(compute(tree, Path(folder)))
    difference = first_difference(*figures)
    if options.json:
        print(json.dumps({"against": figures[0], "here": figures[1], "first_difference": difference}, indent=1))
    else:
        print(f"different from {options.against}: {difference}" if difference else f"same as {options.against}")
    sys.exit(1 if difference else 0)


@contextmanager
def worktree(commit):
    """A temporary checkout of a commit of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compute(tree, folder):
    """All figures of one tree, computed in a folder: name → text."""
    write_dataset_folders(folder)
    return {**pretrain(tree, folder), **finetune(tree, folder)}


def pretrain(tree, folder):
    """Figures of a pretraining that was stopped and continued."""
    stopped = start(tree, folder, "child", "stopping", STOP_AFTER, *PRETRAINING)
    if stopped.returncode != 75:
        raise SystemExit(f"mim_pretrain ended with exit code {stopped.returncode}, not 75:\n{stopped.stdout[-3000:]}")
    continued = start(tree, folder, "child", "stopping", 0, *PRETRAINING, "--c")
    run = pretraining_folder(folder)
    if continued.returncode:
        raise SystemExit(f"mim_pretrain --c failed:\n{continued.stdout[-3000:]}")
    figures = {f"{part}.csv": without_times((run / f"{part}.csv").read_text()) for part in ("train", "val")}
    stored = load(run / "checkpoint_final.pth")
    history = "\n".join(map(repr, stored["provenance"]["loss_history"]))
    return {**figures, "loss_history": history, **hashes_of("pretraining", stored)}


def finetune(tree, folder):
    """Figures of a finetuning of the pretrained encoder."""
    losses = folder / "losses.json"
    done = start(tree, folder, "child", "finetuning", losses)
    if done.returncode:
        raise SystemExit(f"finetuning failed:\n{done.stdout[-3000:]}")
    run = folder / "nnUNet_results" / LABELLED / f"nnUNetTrainerMiM__{PLANS}__{CONFIGURATION}" / "fold_0"
    figures = {f"finetuning loss {i}": loss for i, loss in enumerate(json.loads(losses.read_text()), 1)}
    return {**figures, **hashes_of("finetuning", load(run / "checkpoint_final.pth"))}


def first_difference(before, now):
    """Name and both values of the first figure that is not the same; None where all are."""
    for name in [*before, *(name for name in now if name not in before)]:
        one, two = before.get(name, "missing"), now.get(name, "missing")
        if one == two:
            continue
        for number, pair in enumerate(zip(one.splitlines(), two.splitlines(), strict=False), 1):
            if pair[0] != pair[1]:
                return f"{name}, line {number}: {pair[0]} -> {pair[1]}"
        return f"{name}: {len(one.splitlines())} -> {len(two.splitlines())} lines"
    return None


def without_times(text):
    """A CSV without the columns that no two runs have alike."""
    rows = list(csv.reader(io.StringIO(text)))
    kept = [i for i, name in enumerate(rows[0]) if name not in TIMES]
    return "\n".join(",".join(row[i] for i in kept) for row in rows)


def load(checkpoint):
    """A checkpoint of pretraining or of nnU-Net."""
    import torch

    return torch.load(checkpoint, map_location="cpu", weights_only=False)


def hashes_of(training, checkpoint):
    """SHA-256 of every weight."""
    hashes = {}
    for name, value in checkpoint["network_weights"].items():
        content = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        hashes[f"{training} {name}"] = f"{value.dtype} {tuple(value.shape)} {content}"
    return hashes


def pretraining_folder(folder):
    """Where the pretraining leaves its files."""
    return folder / "nnUNet_results" / LABELLED / f"MiMPretrain__{PLANS}__{CONFIGURATION}" / "fold_0"


# Running the commands of a tree


def entry_of(tree, command):
    """(module, function) of a command, from the tree's pyproject.toml."""
    text = Path(tree, "pyproject.toml").read_text()
    found = re.search(rf'^{command} = "([\w.]+):(\w+)"', text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{tree}/pyproject.toml names no command {command}")
    return found.groups()


def environment(tree, folder):
    """Variables of a process that runs the code of a tree on one thread, in nnU-Net folders below `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().startswith("nnunet_")}
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    plugin = {"nnUNet_extTrainer": str(Path(tree, "nnunet_mim", "_nnunet_plugin"))}
    return {
        **kept, **folders, **threads, **plugin, "PYTHONPATH": str(tree), "SAME_NUMBERS_TREE": str(tree),
        "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f",
    }  # fmt: skip


def start(tree, folder, *arguments):
    """Run this script once more, as a process with the code of a tree."""
    return subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], env=environment(tree, folder), cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def require_tree():
    """Refuse to go on with the package of another tree."""
    import nnunet_mim

    tree = Path(os.environ["SAME_NUMBERS_TREE"]).resolve()
    if tree not in Path(nnunet_mim.__file__).resolve().parents:
        raise SystemExit(f"nnunet_mim is {nnunet_mim.__file__}, not that of {tree}")
    return tree


def run_stopping(arguments):
    """mim_pretrain, with a SIGTERM to itself after so many optimiser steps; 0: none."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    module, function = entry_of(require_tree(), "mim_pretrain")
    torch.set_num_threads(1)
    steps, stop_after = [], int(arguments[0])

    def stop_later(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_post_hook(stop_later)
    return getattr(importlib.import_module(module), function)(arguments[1:])


def run_finetuning(arguments):
    """A training with nnUNetTrainerMiM; writes the losses of all its iterations into a file."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    require_tree()
    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None  # nnU-Net takes all cores of the machine
    dataset = Path(os.environ["nnUNet_preprocessed"], LABELLED)
    plans_file = dataset / f"{PLANS}.json"
    plans_file.write_text(json.dumps({**json.loads(plans_file.read_text()), "mim_finetune": FINETUNING}))
    for sow in (random.seed, np.random.seed, torch.manual_seed):
        sow(11)
    trainer = get_trainer_from_args(
        dataset.name, CONFIGURATION, 0, "nnUNetTrainerMiM", PLANS, device=torch.device("cpu")
    )
    losses, train_step = [], trainer.train_step

    def recording(batch):
        result = train_step(batch)
        losses.append(repr(float(result["loss"])))
        return result

    trainer.train_step = recording
    trainer.run_training()
    Path(arguments[0]).write_text(json.dumps(losses))


# Made-up cases: integer arithmetic, so that they are the same everywhere


def write_dataset_folders(folder):
    """Datasets as nnU-Net's preprocessing leaves them; only the first has labels."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    for name in ("nnUNet_raw", "nnUNet_results"):
        (folder / name).mkdir()
    for number, (dataset, n_cases) in enumerate(DATASETS.items()):
        base = folder / "nnUNet_preprocessed" / dataset
        cases = base / f"{PLANS}_{CONFIGURATION}"
        cases.mkdir(parents=True)
        names = [f"case_{i:02d}" for i in range(n_cases)]
        for i, name in enumerate(names):
            hounsfield, organ = made_up_case(100 * number + i, SHAPE)
            properties = {"class_locations": {1: locations(organ)}, "spacing": SPACING}
            data, seg = hounsfield[None].astype(np.float32) / np.float32(HU_PER_UNIT), organ[None].astype(np.int8)
            nnUNetDatasetBlosc2.save_case(data, seg, properties, str(cases / name), (1, 32, 32, 32), (1, 32, 32, 32))
        write_json(base / f"{PLANS}.json", plans_of(dataset))
        write_json(base / "dataset_fingerprint.json", {
            "spacings": [SPACING] * n_cases, "shapes_after_crop": [SHAPE] * n_cases,
            "foreground_intensity_properties_per_channel": {"0": WINDOW}, "median_relative_size_after_cropping": 1.0,
        })  # fmt: skip
        if dataset == LABELLED:
            write_json(base / "dataset.json", {
                "channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "numTraining": n_cases,
                "file_ending": ".nii.gz",
            })  # fmt: skip
            (base / "gt_segmentations").mkdir()
            folds = [{"train": [n for n in names if n != out], "val": [out]} for out in names]
            write_json(base / "splits_final.json", folds)


def made_up_case(number, shape):
    """An ellipsoid of noisy tissue in air with a denser ball: (HU int64, ball bool), each of `shape`."""
    x, y, z = np.ogrid[tuple(slice(n) for n in shape)]
    mixed = (x * 73856093 + y * 19349663 + z * 83492791 + (number + 1) * 40503) & 0xFFFFFFFF
    for _ in range(3):
        mixed = ((mixed ^ (mixed >> 15)) * 73244475) & 0xFFFFFFFF
    noise = (mixed >> 8) % 161 - 80
    centre = [n // 2 + (number * step) % 9 - 4 for n, step in zip(shape, (2, 5, 7), strict=True)]
    offsets = [axis - c for axis, c in zip((x, y, z), centre, strict=True)]
    inside = sum(offset**2 * 10_000 // (n * n) for offset, n in zip(offsets, shape, strict=True)) < 1900
    moved = [offset - (number * step) % 7 for offset, step in zip(offsets, (3, 1, 4), strict=True)]
    organ = sum(offset**2 for offset in moved) < (8 + number % 5) ** 2
    layers = ((x + 2 * y + number) // 8 % 3 - 1) * 60
    return np.where(inside, 40 + layers + noise + 250 * organ, -990 + noise // 10), organ & inside


def locations(organ):
    """Every third voxel of an organ as nnU-Net keeps them: (N, 4), the channel first."""
    found = np.argwhere(organ)[::3]
    return np.concatenate([np.zeros_like(found[:, :1]), found], axis=1)


def write_json(path, content):
    path.write_text(json.dumps(content))


def plans_of(dataset):
    """Plans of nnU-Net with the wide CT window."""
    configuration = {
        "data_identifier": f"{PLANS}_{CONFIGURATION}", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [32, 32, 32], "median_image_size_in_voxels": [float(n) for n in SHAPE], "spacing": list(SPACING),
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False], "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}, "_kw_requires_import": [],
        },
    }  # fmt: skip
    for kind in ("data", "seg", "probabilities"):
        kwargs = {"is_seg": kind == "seg", "order": 1, "order_z": 0, "force_separate_z": None}
        configuration |= {f"resampling_fn_{kind}": "resample_data_or_seg_to_shape"}
        configuration |= {f"resampling_fn_{kind}_kwargs": kwargs}
    return {
        "dataset_name": dataset, "plans_name": PLANS, "image_reader_writer": "SimpleITKIO",
        "original_median_spacing_after_transp": list(SPACING), "original_median_shape_after_transp": list(SHAPE),
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager", "foreground_intensity_properties_per_channel": {"0": WINDOW},
        "configurations": {CONFIGURATION: configuration},
    }  # fmt: skip


if __name__ == "__main__":
    main()
