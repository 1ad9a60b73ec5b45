"""What is it worth to pretrain the decoder too, and when should it learn? Chosen on cross-validation folds.

    python benchmarks/decoder_experiment.py -d 501 800 -f 1 2 --labels 5 all --seeds 3 --jobs 2 -- ARGUMENTS…

Every arm is pretrained for every fold without the fold's validation cases (`mim_pretrain -f FOLD -o NAME_ARM`), with
ARGUMENTS, such as --preset tiny --view 64 --iterations 6000. Then `mim_benchmark run` finetunes all of them, and
Scratch, on the first dataset with few and with all labels, and reports. What is finished is kept and what was
interrupted is continued: repeat the command. With other ARGUMENTS take another NAME.

    arm       U-Net
    Encoder   starts from random weights
    Together  learns in every fourth iteration
    Phase     learns in the last fifth of the iterations
    Longer    as Encoder, with 1.4 times the iterations: about the computation of Together and Phase (not by default)
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from nnunet_mim.checkpoint.locate import FINAL, LATEST
from nnunet_mim.nnunet.datasets import dataset_name

LONGER = 1.4
ARMS = {
    "Encoder": [],
    "Together": ["--decoder", "unet", "--set", "unet_every=4"],
    "Phase": ["--decoder", "unet", "--decoder_phase", "0.2", "--set", "unet_every=1"],
    "Longer": [],
}


def main():
    options = parser().parse_args()
    folder = Path(os.environ["nnUNet_results"], dataset_name(options.d[0]))
    for fold in options.f:
        for arm in options.arms:
            pretrain(arm, fold, run_folder(folder, arm, options) / f"fold_{fold}", options)
    file = options.output / "bench.yaml"
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(bench(folder, options), indent=2))  # YAML too, and without its aliases
    subprocess.run([sys.executable, "-m", "nnunet_mim.benchmarking.cli", "run", str(file)], check=True)


def parser():
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("-d", nargs="+", required=True, metavar="DATASET", help="the first one is finetuned on")
    add("-f", nargs="+", required=True, metavar="FOLD")
    add("-p", default="nnUNetMiMPlans", metavar="PLANS")
    add("-c", default="3d_fullres", metavar="CONFIGURATION")
    add("-o", default="decoder", metavar="NAME", help="of the pretrainings (default: decoder)")
    add("--output", type=Path, default=Path("decoder_experiment"), help="folder of the finetunings")
    add("--arms", nargs="+", choices=ARMS, default=["Encoder", "Together", "Phase"])
    add("--labels", nargs="+", default=["5", "all"])
    add("--seeds", type=int, default=3)
    add("--finetune_iterations", type=int, default=250)
    add("--lr", type=float, default=3e-3, help="of the finetunings (default: 3e-3, for short ones of tiny)")
    add("--jobs", type=int, default=1, help="finetunings at a time")
    add("-device", default="cpu")
    add("arguments", nargs="*", metavar="ARGUMENTS", help="of every pretraining, after --")
    return found


def run_folder(folder, arm, options):
    return folder / f"MiMPretrain_{options.o}_{arm}__{options.p}__{options.c}"


def pretrain(arm, fold, folder, options):
    """Pretrain one arm unless that is done."""
    if (folder / FINAL).is_file():
        return
    command = [sys.executable, "-m", "nnunet_mim.pretraining.cli", "-d", *options.d, "-p", options.p, "-c", options.c]
    command += ["-f", fold, "-o", f"{options.o}_{arm}", "-device", options.device, *options.arguments, *ARMS[arm]]
    if arm == "Longer":
        at = options.arguments.index("--iterations") + 1
        command += ["--iterations", str(round(LONGER * int(options.arguments[at])))]
    if (folder / LATEST).is_file():
        command.append("--c")
    print(f"pretraining: {arm}, fold {fold}", file=sys.stderr)
    subprocess.run(command, check=True)


def bench(folder, options):
    """Content of the file for mim_benchmark."""
    iterations = options.finetune_iterations
    recipe = {"plans": options.p, "settings": {"lr": options.lr}}
    arms = {
        arm: {
            "trainer": "nnUNetTrainerMiM",
            "checkpoint": str(run_folder(folder, arm, options) / "fold_{fold}" / FINAL),
            **recipe,
        }
        for arm in options.arms
    }
    return {
        "output": "results",
        "datasets": {options.d[0]: {"folds": [int(fold) for fold in options.f], "configuration": options.c}},
        "arms": {**arms, "Scratch": recipe},
        "labels": options.labels,
        "seeds": options.seeds,
        "iterations": iterations,
        "iterations_per_epoch": min(25, iterations),
        "val_iterations": 5,
        "control": "Scratch",
        "device": options.device,
        "jobs": options.jobs,
    }


if __name__ == "__main__":
    main()
