"""Share of a pretraining run that its measurements on held-out cases take.

    python benchmarks/monitor_overhead.py [--preset tiny] [--view 64] [--batch 2] [--steps 10] [--json]

Made-up bodies are preprocessed by nnU-Net's own classes into a temporary folder; then the loop of mim_pretrain runs
`--steps` iterations. The share is that of a run with the default settings: one measurement (all figures, the label
probe and the pictures, each as often as by default) for every `val_every` iterations of the median duration.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from made_up_cases import write_phantoms

from nnunet_mim.config import DEFAULT_LEARNING_RATE, PretrainConfig
from nnunet_mim.pretraining.data.run_data import index_sources, run_data
from nnunet_mim.pretraining.loop import pretrain
from nnunet_mim.pretraining.options import VIEWS_PER_PASS, RunOptions
from nnunet_mim.pretraining.setup import Run

N_CASES = 12
WARM_UP = 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--view", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    config = PretrainConfig(
        preset=options.preset, view_size=(options.view,) * 3, batch_size=options.batch,
        learning_rate=DEFAULT_LEARNING_RATE[options.preset], iterations=options.steps + WARM_UP,
    )  # fmt: skip
    fabric = Fabric(
        accelerator=options.device, devices=1, precision="bf16-mixed" if options.device == "cuda" else "32-true"
    )
    fabric.launch()
    times = []

    def note(_):
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cases" / "cases"
        folder.mkdir(parents=True)
        sources = [write_phantoms(folder, N_CASES, 2 * options.view)]
        data = run_data(index_sources(sources)[0], "all", config)
        output = Path(temporary) / "run"
        output.mkdir()
        short = replace(config, val_every=config.iterations, save_every=config.iterations + 1)
        views_per_pass = VIEWS_PER_PASS.get(options.device)  # as mim_pretrain
        run = Run(short, data, output, RunOptions(workers=0, views_per_pass=views_per_pass))
        record = pretrain(run, fabric, note)
    step_s = statistics.median(b - a for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False))
    parts = {kind: statistics.median(seconds) for kind, seconds in record.monitor.seconds.items()}
    for kind in {"probe", "report"} & set(parts):  # rarer than the others
        parts[kind] *= config.val_every / config.probe_every
    measure_s = sum(parts.values())
    overhead = measure_s / (config.val_every * step_s + measure_s)

    print(f"torch {torch.__version__}, {platform.machine()}, {options.device}, {torch.get_num_threads()} threads; "
          f"{options.preset}, view {options.view}, batch {options.batch}")  # fmt: skip
    print("\n| figure | value |\n|---|---|")
    figures = {
        "step_s": step_s, **{f"{kind}_s": seconds for kind, seconds in parts.items()}, "measure_s": measure_s,
        "val_every": config.val_every, "overhead_fraction": overhead,
    }  # fmt: skip
    for name, value in figures.items():
        print(f"| {name} | {value:.4g} |")
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
