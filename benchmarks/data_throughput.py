"""How fast crops are read, on one core, beside Blosc2 itself.

    python benchmarks/data_throughput.py [--crop 192] [--size 320] [--cases 4] [--crops 40] [--repeats 5] [--json]

Made-up bodies are written by nnU-Net's own classes into a temporary folder. Then the same random crops are read

  raw       by blosc2.open(...)[box], file by file, and nothing else
  dataset   by CropDataset, which draws them, reads them and makes tensors of them
  loader    by the DataLoader of mim_pretrain with one worker, until the batch is in the main process

in turns; the figures are medians over repeats. All of it runs on one core (the loader on two, where there are two).
`fraction_of_raw` is dataset against raw.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import blosc2
import numpy as np
import torch
from made_up_cases import write_phantoms

from nnunet_mim.config import PretrainConfig
from nnunet_mim.pretraining.data.crops import CropDataset
from nnunet_mim.pretraining.data.loading import training_batches
from nnunet_mim.pretraining.data.run_data import index_sources
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.options import RunOptions


def read_raw(boxes):
    for path, box in boxes:
        np.asarray(blosc2.open(path, mode="r", dparams={"nthreads": 1}, mmap_mode="r")[box])


def read_dataset(dataset, count):
    for number in range(count):
        dataset[number]


def read_loader(dataset, count):
    config = PretrainConfig(iterations=count, batch_size=1)
    batches = training_batches(dataset, config, 0, RunOptions(workers=1), torch.device("cpu"), ALONE)
    next(batches)  # starting the worker is not reading
    began = time.perf_counter()
    for _ in batches:
        pass
    return (count - 1) / (time.perf_counter() - began)


def crop_boxes(dataset, count):
    """(file, box) of the first crops of a dataset."""
    boxes = []
    for number in range(count):
        random, drawn = dataset._draw(number)
        case = dataset.cases[drawn]
        start = dataset._start(case.info, random)
        low, high = np.maximum(start, 0), np.minimum(start + dataset.crop_size, case.info.shape)
        box = (slice(None), *(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))
        boxes.append((str(case.source.case_file(case.info.case)), box))
    return boxes


def seconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("crop", 192), ("size", 320), ("cases", 4), ("crops", 40), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "cases")
        folder.mkdir()
        cases, _ = index_sources([write_phantoms(folder, options.cases, options.size)])
        dataset = CropDataset(cases, (options.crop,) * 3)
        boxes = crop_boxes(dataset, options.crops)
        raw, own, loader = [], [], []
        for _ in range(options.repeats + 1):
            if cores:
                os.sched_setaffinity(0, {min(cores)})
            raw.append(options.crops / seconds(read_raw, boxes))
            own.append(options.crops / seconds(read_dataset, dataset, options.crops))
            if cores:
                os.sched_setaffinity(0, cores)
            loader.append(read_loader(dataset, options.crops))
    fractions = [a / b for a, b in zip(own[1:], raw[1:], strict=True)]  # the first round warms the file cache up
    result = {
        "crop": options.crop,
        "crops_per_s_per_core": statistics.median(own[1:]),
        "raw_blosc2_crops_per_s_per_core": statistics.median(raw[1:]),
        "fraction_of_raw": statistics.median(fractions),
        "loader_crops_per_s_one_worker": statistics.median(loader[1:]),
        "mb_per_s_per_core": statistics.median(own[1:]) * options.crop**3 * 4 / 1e6,
        "blosc2": blosc2.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(f"crops of {options.crop}³ voxels a second, one core (median of {options.repeats})")
    print(f"  raw Blosc2            {result['raw_blosc2_crops_per_s_per_core']:8.1f}")
    print(f"  CropDataset           {result['crops_per_s_per_core']:8.1f}   {result['fraction_of_raw']:.2f} of raw")
    print(f"  DataLoader, 1 worker  {result['loader_crops_per_s_one_worker']:8.1f}")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
