"""Loss curves of mim_pretrain in bfloat16 beside those in float32, from the same crops, masks and initial weights.

    python benchmarks/precision_curves.py -d 800 -p nnUNetMiMPlans --seeds 3 --json -- --preset tiny --view 32 \\
        --iterations 200 --batch 2 --children 2 1 --scale 2 2 2

What follows `--` goes to every mim_pretrain; -device is cpu unless given. Runs have the tags precision_32_0,
precision_bf16_0, …; finished ones are kept. On a CPU bfloat16 has the same roundings of weights, activations and
gradients as on a GPU, but sums in other orders.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from nnunet_mim.pretraining.monitoring.figures import Measurement

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}


def run(options, precision, seed):
    """Train unless it is done; reconstruction loss on held-out crops, by iteration and level."""
    tag = f"precision_{precision}_{seed}"
    command = [
        sys.executable, "-m", "nnunet_mim.pretraining.cli", "-d", *options.d, "-p", options.p, "-o", tag,
        "-device", options.device, "--precision", PRECISIONS[precision], *options.rest,
        "--set", f"seed={seed}", "probe_every=0", f"val_every={options.every}", f"save_every={options.every}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if "finished" in done.stderr and "holds another" in done.stderr:
        folder = Path(done.stderr.split("error: ")[1].split(" holds another")[0])
    elif done.returncode:
        raise SystemExit(done.stderr[-2000:])
    else:
        folder = Path(done.stdout.split("wrote ")[-1].split("\n")[0]).parent
    with (folder / "val.csv").open() as file:
        rows = [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]
    measured = [Measurement.from_row(row) for row in rows]
    return {int(one.iteration): {level.number: level.reconstruction for level in one.levels} for one in measured}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-d", nargs="+", required=True)
    add("-p", default="nnUNetMiMPlans")
    add("-device", default="cpu")
    add("--seeds", type=int, default=3)
    add("--every", type=int, default=25, help="iterations between two measurements on held-out crops")
    add("--json", action="store_true")
    add("rest", nargs="*")
    options = parser.parse_args()

    curves = {
        precision: [run(options, precision, seed) for seed in range(options.seeds)] for precision in PRECISIONS
    }
    rows = []
    for iteration in sorted(curves["32"][0]):
        for level in sorted(curves["32"][0][iteration]):
            full, half = ([c[iteration][level] for c in curves[p]] for p in ("32", "bf16"))
            differences = [b - a for a, b in zip(full, half, strict=True)]
            rows.append(
                {
                    "iteration": iteration,
                    "level": level,
                    "float32": round(statistics.mean(full), 4),
                    "bfloat16": round(statistics.mean(half), 4),
                    "mean_difference": round(statistics.mean(differences), 4),
                    "largest_difference": round(max(differences, key=abs), 4),
                    "spread_of_seeds": round(max(full) - min(full), 4),
                }
            )
    print("| iteration | level | float32 | bfloat16 | mean difference | largest | spread of seeds in float32 |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    if options.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
