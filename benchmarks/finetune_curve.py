"""The learning curve of one finetuning, with the same batches for every recipe and every trainer.

    nnUNet_mim_checkpoint=CHECKPOINT python benchmarks/finetune_curve.py -d 501 -tr nnUNetTrainerMiM --iterations 250
        --set lr=0.003 layer_decay=1

nnU-Net draws and augments in processes of its own, in an order that differs from run to run; for that alone two
trainings of one recipe differ by two or three points of Dice. Here everything is drawn in this process from one seed,
so that recipes can be told apart by one training each. Every 25 iterations: loss, and nnU-Net's Dice on validation
patches.

`--autocast float16` computes as nnU-Net does on a GPU, with its scaling of gradients; bfloat16 and float32 beside it
tell whether a recipe falls apart for its learning rate or for its precision (`--set lr=0.003`, `-device cuda`).

To train on a subset of the labels, set nnUNet_preprocessed to that of a training of the few-shot protocol
(cells/…/ARM/nnUNet_preprocessed).
"""

import argparse
import json
import os
import random
from pathlib import Path

os.environ["nnUNet_n_proc_DA"] = "0"

import numpy as np
import torch

import nnunet_mim.trainers as trainers
from nnunet_mim.nnunet.datasets import dataset_name
from nnunet_mim.settings import parse_settings

ITERATIONS_PER_EPOCH = 25
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main():
    options = parser_of(__doc__).parse_args()
    rows = learning_curve(trainer_of(options), options.seed, options.autocast)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print("| iterations | loss | Dice on patches |\n|---|---|---|")
    for row in rows:
        print(f"| {row['iterations']} | {row['loss']:.3f} | {row['dice']:.3f} |")


def parser_of(description):
    """Options of every script that trains this way."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("-p", default="nnUNetMiMPlans", metavar="PLANS")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION")
    parser.add_argument("-tr", default="nnUNetTrainerMiM", choices=["nnUNetTrainerMiM", "nnUNetTrainerMiMScratch"])
    parser.add_argument("-f", type=int, default=0, metavar="FOLD")
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--val_iterations", type=int, default=8, help="batches of patches that are validated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as for mim_plan")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--autocast", choices=list(PRECISIONS), help="default: as the trainer does on the device")
    parser.add_argument("--json", action="store_true")
    return parser


def trainer_of(options):
    """A trainer with the recipe of the plans, changed as asked for."""
    torch.set_num_threads(options.threads)
    folder = Path(os.environ["nnUNet_preprocessed"], dataset_name(options.d))
    plans = json.loads((folder / f"{options.p}.json").read_text())
    per_epoch = min(ITERATIONS_PER_EPOCH, options.iterations)
    length = {"num_epochs": options.iterations // per_epoch, "iterations_per_epoch": per_epoch}
    length["val_iterations_per_epoch"] = options.val_iterations
    plans["mim_finetune"] = {**plans.get("mim_finetune", {}), **parse_settings(options.set), **length}
    dataset = json.loads((folder / "dataset.json").read_text())
    sow(options.seed)
    trainer = getattr(trainers, options.tr)(plans, options.c, options.f, dataset, torch.device(options.device))
    trainer.disable_checkpointing = True
    return trainer


def learning_curve(trainer, seed, precision=None):
    """Train as nnU-Net does, in its own methods, with batches that the seed alone decides."""
    trainer.on_train_start()
    if precision is not None:
        set_precision(trainer, PRECISIONS[precision])
    sow(seed)
    rows = []
    for epoch in range(trainer.num_epochs):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        steps = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            n_batches = trainer.num_val_iterations_per_epoch
            outputs = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(n_batches)]
        found, missed, wrong = (sum(output[key] for output in outputs) for key in ("tp_hard", "fn_hard", "fp_hard"))
        dice = 2 * found / np.maximum(2 * found + missed + wrong, 1)
        iterations = (epoch + 1) * trainer.num_iterations_per_epoch
        loss = float(np.mean([step["loss"] for step in steps]))
        rows.append({"iterations": iterations, "loss": loss, "dice": float(dice.mean()), "dice_each": dice.tolist()})
        trainer.print_to_log_file(f"{iterations} iterations: loss {loss:.3f}, Dice {dice.round(3)}")
        trainer.current_epoch += 1
    return rows


def set_precision(trainer, dtype):
    """Let the network of a trainer compute in autocast of this type, whatever the trainer's own is; None: in float32.

    Gradients are scaled for float16 alone, as nnU-Net does.
    """
    device = trainer.device.type
    network = trainer.network.forward

    def forward(*inputs):
        with torch.autocast(device, dtype, enabled=dtype is not None):
            outputs = network(*inputs)
        return [output.float() for output in outputs] if isinstance(outputs, list | tuple) else outputs.float()

    trainer.network.forward = forward
    trainer.grad_scaler = torch.amp.GradScaler(device) if dtype == torch.float16 else None


def sow(seed):
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)


if __name__ == "__main__":
    main()
