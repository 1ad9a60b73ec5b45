"""Start-up time and memory of a run by its number of cases.

    python benchmarks/many_cases.py [--counts 100 1000 10000] [--workers 2] [--json]

Small cases are written by nnU-Net's own classes into a temporary folder, and indexed once (as mim_prepare does, or the
first run). Then a new process for each count opens them as mim_pretrain does, from the plans file on, and waits for the
first batch. Measured: seconds from the end of the imports to the first batch, without and with worker processes, the
memory of the main process (resident set) before and then, and what all workers add (proportional set: shared pages
count once), Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from made_up_cases import write_case, write_plans

SIDE = 12


def write_cases(folder, count):
    random = np.random.default_rng(0)
    for number in range(count):
        data = random.normal(0, 1, (1, SIDE, SIDE, SIDE))
        write_case(folder, f"patient_{number:06d}_thorax", data, np.zeros_like(data), (128, 128, 128))


def link_cases(source, folder, count):
    """The first cases again, in a folder of their own."""
    folder.mkdir(parents=True)
    for file in sorted(source.iterdir())[: 3 * count]:
        os.link(file, folder / file.name)


def memory(field, process="self"):
    """MB that /proc/…/smaps_rollup gives; None where there is no /proc."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(workers):
    """In a new process: open all cases, wait for the first batch, print figures."""
    import torch

    from nnunet_mim.config import PretrainConfig
    from nnunet_mim.nnunet.source import find_source
    from nnunet_mim.pretraining.data.loading import training_batches, training_crops
    from nnunet_mim.pretraining.data.run_data import index_sources, run_data
    from nnunet_mim.pretraining.distributed.ranks import ALONE
    from nnunet_mim.pretraining.options import RunOptions

    torch.set_num_threads(1)
    before = memory("Rss")
    began = time.perf_counter()
    cases, bad = index_sources([find_source("900", "plans", "3d_fullres")])
    config = PretrainConfig(preset="tiny", view_size=(32, 32, 32), iterations=1000)
    data = run_data(cases, "all", config)
    records = data.train.records()
    opened = time.perf_counter() - began
    crops, options = training_crops(data, config), RunOptions(workers=workers)
    batches = training_batches(crops, config, 0, options, torch.device("cpu"), ALONE)
    next(batches)
    figures = {
        "cases": len(cases),
        "opened_s": opened,
        "first_batch_s": time.perf_counter() - began,
        "rss_before_mb": before,
        "rss_mb": memory("Rss"),
    }
    if workers:
        children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
        parts = [memory("Pss", child) for child in children]
        figures["workers_pss_mb"] = sum(part for part in parts if part is not None)
    assert len(records) + len(data.val) == len(cases)
    assert not bad
    print(json.dumps(figures))
    batches.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.workers)
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        everything = Path(temporary, "all")
        everything.mkdir()
        write_cases(everything, max(options.counts))
        for count in options.counts:
            base = Path(temporary, str(count), "Dataset900_Phantoms")
            link_cases(everything, base / "cases", count)
            write_plans(base, "cases")
            folders = {f"nnUNet_{name}": str(base.parent) for name in ("raw", "preprocessed", "results")}
            for workers in (0, 0, options.workers):  # the first one makes the index
                command = [sys.executable, __file__, "--measure", "--workers", str(workers)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | folders)
                row = {"workers": workers, **json.loads(done.stdout.strip().splitlines()[-1])}
                rows.append(row)
            rows[-3]["first"] = True
    shown = [row for row in rows if not row.get("first")]
    print("   cases  workers  opened s  first batch s   RSS MB  of it opening  workers' PSS MB")
    for row in shown:
        rss, pss = (f"{row[name]:.0f}" if row.get(name) is not None else "-" for name in ("rss_mb", "workers_pss_mb"))
        added = "-" if row["rss_mb"] is None else f"{row['rss_mb'] - row['rss_before_mb']:.0f}"
        times = f"{row['opened_s']:9.2f} {row['first_batch_s']:14.2f}"
        print(f"{row['cases']:8} {row['workers']:8} {times} {rss:>8} {added:>14} {pss:>16}")
    alone = sorted((row for row in shown if not row["workers"]), key=lambda row: row["cases"])
    few, many = alone[0], alone[-1]
    result = {"rows": rows, "start_s": many["first_batch_s"], "python": platform.python_version()}
    if few["rss_mb"] is not None:
        result["memory_ratio"] = many["rss_mb"] / few["rss_mb"]
        print(f"{many['cases']} cases take {result['memory_ratio']:.2f} times the memory of {few['cases']}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
