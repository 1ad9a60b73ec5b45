"""What an exponential moving average of the weights is worth in finetuning, from the same trainings.

    python benchmarks/ema.py -d 501 [-p nnUNetMiMPlans] [-tr nnUNetTrainerMiM] [-f 0] --iterations 500 -o FOLDER

Trains once, keeps averages with several decays beside the weights, and validates each of them as nnU-Net does at the
end: the rows differ by nothing but the averaging. The recipe is that of the plans. To train on a subset of the labels,
set nnUNet_preprocessed to that of a training of the few-shot protocol (cells/…/ARM/nnUNet_preprocessed).
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_mim.benchmarking.seeded_training import Length, set_length

ITERATIONS_PER_EPOCH, VAL_ITERATIONS = 50, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("-p", default="nnUNetMiMPlans", metavar="PLANS")
    parser.add_argument("-tr", default="nnUNetTrainerMiM", metavar="TRAINER")
    parser.add_argument("-f", type=int, default=0, metavar="FOLD")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decays", type=float, nargs="+", default=[0.95, 0.98, 0.99, 0.995])
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="for the predictions of every row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(options.seed)
    per_epoch = min(ITERATIONS_PER_EPOCH, options.iterations)
    set_length(nnUNetTrainer, Length(options.iterations // per_epoch, per_epoch, VAL_ITERATIONS))
    device = torch.device(options.device)
    trainer = get_trainer_from_args(options.d, "3d_fullres", options.f, options.tr, options.p, device=device)
    trainer.disable_checkpointing = True
    trainer.output_folder = str(Path(options.o, "training"))
    averages = averaged_while_training(trainer, options.decays)
    trainer.run_training()
    weights = {"none": trainer.network.state_dict(), **averages}
    rows = []
    for decay, state in [(d, {k: v.clone() for k, v in s.items()}) for d, s in weights.items()]:
        trainer.network.load_state_dict(state)
        rows.append({"decay": decay, **validated(trainer, Path(options.o, f"decay_{decay}"))})
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print("| decay | mean Dice | Dice of each label |\n|---|---|---|")
    for row in rows:
        print(f"| {row['decay']} | {row['mean']:.4f} | {' '.join(f'{dice:.4f}' for dice in row['labels'])} |")


def averaged_while_training(trainer, decays):
    """Have `trainer` keep averages of its weights from its first step on; decay → state dict, filled in later."""
    averages = {decay: {} for decay in decays}
    step = trainer.train_step

    def train_step(batch):
        result = step(batch)
        for decay, average in averages.items():
            for name, weight in trainer.network.state_dict().items():
                if name in average:
                    average[name].lerp_(weight.detach(), 1 - decay)
                else:
                    average[name] = weight.detach().clone()
        return result

    trainer.train_step = train_step
    return averages


def validated(trainer, folder):
    """nnU-Net's own validation of the weights that are in the network now."""
    trainer.output_folder = str(folder)
    trainer.perform_actual_validation()
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    labels = [metric["Dice"] for metric in summary["mean"].values()]
    return {"mean": summary["foreground_mean"]["Dice"], "labels": labels}


if __name__ == "__main__":
    main()
