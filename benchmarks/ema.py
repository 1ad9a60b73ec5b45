"""What an exponential moving average of the weights is worth in finetuning, from the same trainings.

    python benchmarks/ema.py -d 501 [-tr nnUNetTrainerMiM] [--set KEY=VALUE …] --iterations 500 -o FOLDER

Trains once, as finetune_curve.py does, keeps averages with several decays beside the weights, and validates each of
them as nnU-Net does at the end: the rows differ by nothing but the averaging.
"""

import json
from pathlib import Path

from finetune_curve import learning_curve, parser_of, trainer_of


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--decays", type=float, nargs="*", default=[0.95, 0.98, 0.99, 0.995])
    parser.add_argument("-o", required=True, metavar="FOLDER", help="for the predictions of every row")
    options = parser.parse_args()

    trainer = trainer_of(options)
    averages = averaged_while_training(trainer, options.decays)
    learning_curve(trainer, options.seed)
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
