"""Start-up time and memory of a run by its number of cases.

    python benchmarks/many_cases.py [--counts 100 1000 10000] [--workers 2] [--json]
    python benchmarks/many_cases.py --made_up --counts 10000 100000 --workers 0    # with --trust_index

Small cases are written by nnU-Net's own classes into a temporary folder, and indexed once (as mim_prepare does, or the
first run). Then a new process for each count opens them as mim_pretrain does, from the plans file on, and waits for the
first batch. Measured: seconds from the end of the imports to the first batch, without and with worker processes (with
--json also those of the CPU alone, for a busy machine); the memory of the main process (resident set) before and then,
and what all workers add (proportional set: shared pages count once), Linux only. Then the records of all cases, which
each checkpoint holds: seconds, and the memory with them.

With --made_up a few real cases stand behind all names (links), and the index holds made-up entries. It is trusted, as
by `mim_pretrain --trust_index`.
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
LINKS = 30_000
"""names that stand for one file: a file system allows some 65,000 (ext4)"""


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


def write_made_up_entries(base, count):
    """A dataset of links to a few cases, with an index of random entries that hold the stamps of these."""
    from nnunet_mim.checkpoint.fingerprint import FINGERPRINT_SHAPE
    from nnunet_mim.nnunet.source import find_source
    from nnunet_mim.pretraining.data.case_index import N_BODY_POINTS, CaseIndex, _save_cache

    originals = base / "originals"
    originals.mkdir(parents=True)
    write_cases(originals, 1 + count // LINKS)
    files = sorted(file for file in originals.glob("*.b2nd") if not file.stem.endswith("_seg"))
    (base / "cases").mkdir()
    names = [f"patient_{number:06d}_thorax" for number in range(count)]
    for number, name in enumerate(names):
        os.link(files[number // LINKS], base / "cases" / f"{name}.b2nd")
    write_plans(base, "cases")
    stamps = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    random = np.random.default_rng(0)
    index = CaseIndex(
        np.array(names, np.str_),
        np.full((count, 3), SIDE, np.int32),
        random.integers(0, 256, (count, 32), np.uint8),
        np.tile(np.array([[[-4.0], [4.0]]]), (count, 1, 1)),
        random.integers(0, SIDE, (count, N_BODY_POINTS, 3), np.int16),
        random.integers(0, 256, (count, 32), np.uint8),
        random.integers(-128, 128, (count, *FINGERPRINT_SHAPE), np.int8),
        np.array([stamps[number // LINKS] for number in range(count)], np.int64),
    )
    _save_cache(find_source("900", "plans", "3d_fullres"), index)


def memory(field, process="self"):
    """MB that /proc/…/smaps_rollup gives; None where there is no /proc."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(workers, trusted):
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
    began, cpu_before = time.perf_counter(), time.process_time()
    cases, bad = index_sources([find_source("900", "plans", "3d_fullres")], trust_index=trusted)
    config = PretrainConfig(preset="tiny", view_size=(32, 32, 32), iterations=1000)
    data = run_data(cases, "all", config)
    opened = time.perf_counter() - began
    crops, options = training_crops(data, config), RunOptions(workers=workers)
    batches = training_batches(crops, config, 0, options, torch.device("cpu"), ALONE)
    next(batches)
    figures = {
        "cases": len(cases),
        "opened_s": opened,
        "first_batch_s": time.perf_counter() - began,
        "first_batch_cpu_s": time.process_time() - cpu_before,
        "rss_before_mb": before,
        "rss_mb": memory("Rss"),
    }
    began = time.perf_counter()
    records = data.train.records()
    figures |= {"records_s": time.perf_counter() - began, "rss_with_records_mb": memory("Rss")}
    if workers:
        children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
        parts = [memory("Pss", child) for child in children]
        figures["workers_pss_mb"] = sum(part for part in parts if part is not None)
    assert len(records) + len(data.val) == len(cases)
    assert not bad
    print(json.dumps(figures))
    batches.close()


def call(environment, *arguments):
    """Run this file in a new process; the figures that it printed last, if any."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "{}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--made_up", action="store_true", help="made-up entries in a trusted index")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.workers, options.made_up)
        return
    if options.base:
        write_made_up_entries(Path(options.base), options.counts[0])
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        everything = Path(temporary, "all")
        everything.mkdir()
        if not options.made_up:
            write_cases(everything, max(options.counts))
        for count in options.counts:
            base = Path(temporary, str(count), "Dataset900_Phantoms")
            folders = {f"nnUNet_{name}": str(base.parent) for name in ("raw", "preprocessed", "results")}
            if options.made_up:
                call(folders, "--base", base, "--counts", count)
            else:
                link_cases(everything, base / "cases", count)
                write_plans(base, "cases")
                first = call(folders, "--measure", "--workers", 0)  # makes the index
                rows.append({"workers": 0, "first": True, **first})
            for workers in sorted({0, options.workers}):
                mode = ["--made_up"] if options.made_up else []
                rows.append({"workers": workers, **call(folders, "--measure", "--workers", workers, *mode)})
    shown = [row for row in rows if not row.get("first")]
    print("   cases  workers  opened s  first batch s   RSS MB  of it opening  workers' PSS MB  records s  RSS MB then")
    for row in shown:
        rss, pss = (f"{row[name]:.0f}" if row.get(name) is not None else "-" for name in ("rss_mb", "workers_pss_mb"))
        added = "-" if row["rss_mb"] is None else f"{row['rss_mb'] - row['rss_before_mb']:.0f}"
        times = f"{row['opened_s']:9.2f} {row['first_batch_s']:14.2f}"
        then = f"{row['records_s']:10.2f} {row['rss_with_records_mb'] or 0:12.0f}"
        print(f"{row['cases']:8} {row['workers']:8} {times} {rss:>8} {added:>14} {pss:>16} {then}")
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
