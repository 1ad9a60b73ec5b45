"""Which parts of the pretraining earn their cost: one run of mim_pretrain a variant, judged by the label probe.

    python benchmarks/ablation.py -d 501 800 -f 0 [--only default native …] [--narrow PLANS] [-o NAME] -- ARGUMENTS…

ARGUMENTS are those of every run, such as --preset tiny --view 64 --iterations 1000 -device cpu. Finished runs are kept,
interrupted ones continued: repeat the command. The runs are mim_pretrain -o NAME_VARIANT, and stay in
nnUNet_results; with other ARGUMENTS take another NAME.

The label probe (mean Dice of a linear classifier on the frozen features, on held-out labelled cases) is the mean of the
last three that a run has measured. Held-out losses are not comparable between variants that mask or look differently.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from nnunet_mim.checkpoint.locate import FINAL, LATEST
from nnunet_mim.nnunet.datasets import dataset_name
from nnunet_mim.pretraining.monitoring.figures import Measurement

VARIANTS = {
    "default": [],
    "default_seed_1": ["--seed", "1"],  # what differs by chance
    "one_level": ["--alignment", "none", "--set", "level_weights=1,0,0"],
    "two_levels": ["--set", "level_weights=1,1,0"],
    "native": ["--ladder", "native"],
    "no_alignment": ["--alignment", "none"],
    "cosine": ["--alignment", "cosine"],
    "mask_less": ["--mask_ratios", "0.5", "0.4", "0.3"],
    "mask_more": ["--mask_ratios", "0.5", "0.75", "0.7"],
    "scale_1": ["--scale", "1", "1", "1"],
    "narrow_window": [],
}
LAST_PROBES = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", nargs="+", required=True, metavar="DATASET")
    parser.add_argument("-p", default="nnUNetMiMPlans", metavar="PLANS")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION")
    parser.add_argument("-f", required=True, metavar="FOLD")
    without_plans = [name for name in VARIANTS if name != "narrow_window"]
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=without_plans)
    parser.add_argument("--narrow", metavar="PLANS", help="with a narrow CT window, for narrow_window")
    parser.add_argument("-o", default="ablation", metavar="NAME", help="of the runs (default: ablation)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENTS")
    options = parser.parse_args()
    if "narrow_window" in options.only and not options.narrow:
        parser.error("narrow_window needs --narrow PLANS (mim_prepare --set ct_window=-103,164 -p PLANS)")
    rows = [{"variant": name, **run(name, options)} for name in options.only]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print("| variant | label probe | before | level 1 | level 2 | level 3 | rank | crops/s |")
    print("|---" * 8 + "|")
    for row in rows:
        numbers = [row[name] for name in ("probe", "probe_before", "level1", "level2", "level3", "rank", "crops_per_s")]
        cells = ["–" if number is None else f"{number:.3g}" for number in numbers]
        print(f"| {row['variant']} | {' | '.join(cells)} |")


def run(name, options):
    """Pretrain one variant unless that is done; its figures."""
    plans = options.narrow if name == "narrow_window" else options.p
    dataset = dataset_name(options.d[0])
    folder = Path(os.environ["nnUNet_results"], dataset, f"MiMPretrain_{options.o}_{name}__{plans}__{options.c}")
    folder = folder / f"fold_{options.f}"
    if not (folder / FINAL).is_file():
        command = [sys.executable, "-m", "nnunet_mim.pretraining.cli", "-d", *options.d, "-p", plans, "-c", options.c]
        command += ["-f", options.f, "-o", f"{options.o}_{name}", *options.arguments]
        if (folder / LATEST).is_file():
            command.append("--c")
        command += VARIANTS[name]  # with --c too: the last one of a flag counts, so they override ARGUMENTS
        subprocess.run(command, check=True, stdout=sys.stderr)
    return {**figures(folder / "val.csv"), "crops_per_s": crops_per_second(folder / "train.csv")}


def figures(path):
    """The last measurement of a run, and its label probes."""
    with path.open() as file:
        cells = list(csv.DictReader(file))
    rows = [Measurement.from_row({name: float(cell) for name, cell in row.items() if cell}) for row in cells]
    probes = [row.probe.dice for row in rows if row.probe.dice is not None]
    after = probes[1:][-LAST_PROBES:]
    last = rows[-1]
    return {
        "probe": sum(after) / len(after) if after else None,
        "probe_before": probes[0] if probes else None,
        **{f"level{n}": last.level(n).reconstruction for n in (1, 2, 3)},
        "rank": last.feature_rank,
    }


def crops_per_second(path):
    """Median of a run: what a variant costs, whenever it was trained."""
    with path.open() as file:
        rates = [float(row["crops_per_s"]) for row in csv.DictReader(file) if row["crops_per_s"]]
    return statistics.median(rates) if rates else None


if __name__ == "__main__":
    main()
