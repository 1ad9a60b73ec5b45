"""One run on several datasets: shares, counts, losses of each, and a case that breaks on the way."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.checkpoint.locate import find_checkpoint
from nnunet_mim.pretraining import cli, loop

NAMES = ("Dataset900_Tiny", "Dataset950_Tiny")
RUN = ("-p", "tinyPlans", "--preset", "tiny", "--view", "32", "--scale", "2", "2", "2", "-device", "cpu",
       "--children", "2", "1", "--batch", "2", "--workers", "0", "--set", "val_crops=2", "probe_every=0")  # fmt: skip


@pytest.fixture
def datasets(write_dataset):
    """Nine labelled cases and three without labels."""
    write_dataset(n=9, number=900)
    write_dataset(n=3, number=950, labelled=False)


def run(*args):
    return cli.main(["-d", "900", "950", *RUN, *args])


def test_counts_and_losses_of_each(datasets, small_runs, capsys):
    assert run("-o", "run", "--iterations", "12", "-f", "0") == 0
    said = capsys.readouterr().out
    assert "  Dataset900_Tiny: 7 and 2 cases, 65% of the crops" in said  # sqrt(7) and sqrt(2)
    assert "  Dataset950_Tiny: 2 and 1 cases, 35% of the crops" in said
    folder = small_runs.folder("run", 0)
    crops = load_checkpoint(folder / "checkpoint_final.pth")["provenance"]["crops_seen"]
    assert sum(crops.values()) == 24
    assert set(crops) == set(NAMES)
    assert min(crops.values()) > 0
    lines = [line.split(",") for line in (folder / "train.csv").read_text().splitlines()]
    last = dict(zip(lines[0], lines[-1], strict=True))
    assert {name: int(last[f"train/crops/{name}"]) for name in NAMES} == crops
    header = (folder / "val.csv").read_text().splitlines()[0].split(",")
    assert {f"val/{name}/level3" for name in NAMES} <= set(header)
    page = (folder / "report.html").read_text()
    assert "<h2>Datasets</h2>" in page
    assert f"<td>{NAMES[1]}</td><td>2</td><td>{crops[NAMES[1]]}</td>" in page


def test_every_dataset_finds_the_checkpoint(datasets, small_runs, tmp_path):
    assert run("-o", "run", "--iterations", "1") == 0
    final = small_runs.folder("run") / "checkpoint_final.pth"
    plans = {"plans_name": "tinyPlans"}
    for name in NAMES:
        assert find_checkpoint({**plans, "dataset_name": name}, "3d_fullres", 0, tmp_path / "results") == final
    moved = (tmp_path / "results").rename(tmp_path / "elsewhere")
    found = find_checkpoint({**plans, "dataset_name": NAMES[1]}, "3d_fullres", "all", moved)
    assert found == moved / final.relative_to(tmp_path / "results")
    final_there = moved / final.relative_to(tmp_path / "results")
    final_there.unlink()
    assert find_checkpoint({**plans, "dataset_name": NAMES[1]}, "3d_fullres", "all", moved) is None


def test_a_continued_run_counts_on(datasets, small_runs, monkeypatch):
    assert run("-o", "whole", "--iterations", "12") == 0

    class StopError(Exception):
        pass

    def stop(done):
        if done == 8:
            raise StopError

    original = loop.pretrain
    with monkeypatch.context() as patch:
        patch.setattr(loop, "pretrain", lambda *args: original(*args, on_step=stop))
        with pytest.raises(StopError):
            run("-o", "parts", "--iterations", "12", "--save_every", "5")
    assert run("-o", "parts", "--iterations", "12", "--save_every", "5", "--c") == 0
    whole, parts = (
        load_checkpoint(small_runs.folder(tag) / "checkpoint_final.pth")["provenance"]["crops_seen"]
        for tag in ("whole", "parts")
    )
    assert whole == parts


def test_a_case_that_breaks_on_the_way_is_named_and_replaced(datasets, small_runs, monkeypatch, capsys):
    original, broken = loop.training_batches, []

    def break_one(dataset, *args):
        case = dataset.case_of(6)  # of the fourth iteration
        case.source.case_file(case.info.case).write_bytes(b"no blosc")
        broken.append(f"{case.source.dataset} {case.info.case}")
        return original(dataset, *args)

    monkeypatch.setattr(loop, "training_batches", break_one)
    assert run("-o", "run", "--iterations", "10") == 0
    said = "".join(capsys.readouterr())
    assert said.count(f"{broken[0]} has changed or cannot be read any more: other cases take its place") == 1
    assert float(small_runs.rows("run")[-1]["train/unread"]) >= 1


def test_temperature_one_draws_all_cases_alike(datasets, capsys):
    assert run("--iterations", "1", "--set", "dataset_temperature=1") == 0
    said = capsys.readouterr().out
    assert "Dataset900_Tiny: 8 and 1 cases, 80% of the crops" in said
    assert cli.main(["-d", "900", "950", *RUN, "-o", "x", "--set", "dataset_temperature=0"]) == 2
    assert "dataset_temperature must be above 0" in capsys.readouterr().err


def test_copies_within_and_across_datasets_are_named_at_the_start_and_used(datasets, write_dataset, save_case, capsys):
    folders = {name: next(path for path in datasets_folder(name).iterdir() if path.is_dir()) for name in NAMES}
    voxels = voxels_of(folders[NAMES[0]], "case_00")
    save_case(folders[NAMES[0]], "case_01", voxels[:, ::-1])
    save_case(folders[NAMES[1]], "case_02", voxels[:, 1:, :, :-1] + 0.04)
    save_case(folders[NAMES[1]], "case_01", voxels[:, :18])
    assert run("--iterations", "1") == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "probably the same" in line)
    assert line.startswith("warning: probably the same, and used all the same: ")
    for copy in (f"{NAMES[0]} case_01", f"{NAMES[1]} case_02"):
        assert copy in line
    assert "1 cases have no fingerprint" in line
    counts = re.search(r"(\d+) training and (\d+) held-out cases", said)
    assert sum(map(int, counts.groups())) == 12, "none is left out"


def datasets_folder(name):
    return Path(os.environ["nnUNet_preprocessed"], name)


def voxels_of(folder, case):
    return np.asarray(nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)[0][:])
