"""`--dry-run`: a few real steps, figures of the whole run, and nothing left behind."""

import re

import pytest
from lightning_fabric import Fabric

from nnunet_mim.config import PretrainConfig
from nnunet_mim.pretraining import cli
from nnunet_mim.pretraining.dry_run import GIB, _duration, _largest_batch, _Trial


def figures(text):
    return {line.split()[0]: line for line in text.splitlines() if line.split()}


def test_a_dry_run_prints_the_budget_and_writes_nothing(write_dataset, small_runs, capsys, tmp_path, monkeypatch):
    write_dataset(n=2)
    monkeypatch.setattr("nnunet_mim.pretraining.dry_run.SECONDS", 1.0)
    assert small_runs.here("-o", "run", "--iterations", "1000", "--dry-run") == 0
    printed = figures(capsys.readouterr().out)
    speed = float(re.search(r"([\d.e-]+) crops/s", printed["speed"])[1])
    step = float(re.search(r"\(([\d.e-]+) s an iteration", printed["speed"])[1])
    assert speed == pytest.approx(1 / step, rel=0.02)
    minutes = float(re.search(r"([\d.]+) minutes for 1000 iterations", printed["whole"])[1])
    assert minutes * 60 >= 0.98 * 1000 * step
    assert "compute" in printed["bottleneck"]
    assert float(re.search(r"([\d.]+) GiB", printed["peak"])[1]) > 0.1
    assert int(re.search(r"about (\d+) crops", printed["batch"])[1]) >= 1
    assert not small_runs.folder("run").exists()
    assert not (tmp_path / "results").exists()


def test_the_largest_batch_by_hand(monkeypatch):
    """2 crops take 3 GiB, 4 take 5: 1 GiB a crop, and nine tenths of 16 GiB leave room for 2 + 11."""
    monkeypatch.setattr("nnunet_mim.pretraining.dry_run.physical_memory", lambda: 16 * GIB)
    config, fabric = PretrainConfig(batch_size=2), Fabric(accelerator="cpu", devices=1)
    assert _largest_batch(config, _Trial(1, 1, 3 * GIB, 1), _Trial(1, 1, 5 * GIB, 1), fabric) == 13
    without_growth = _largest_batch(config, _Trial(1, 1, 3 * GIB, 1), _Trial(1, 1, 3 * GIB, 1), fabric)
    assert without_growth == 2 + int(11.4 * GIB / (4 * (21 * 96**3 + 2 * 192**3)))  # the views, and the crop twice


@pytest.mark.parametrize(("seconds", "text"), [(90, "1.5 minutes"), (7200, "2.0 hours"), (259200, "3.0 days")])
def test_durations(seconds, text):
    assert _duration(seconds) == text


def test_much_measuring_is_said_with_what_to_change():
    def said(share, **settings):
        return cli._measuring_text(share, PretrainConfig(iterations=100, **settings))

    took = "measurements on held-out cases took 35.3% of the time"
    assert said(0.353, val_every=20, probe_every=40) == f"{took}: raise --val_every (20) and --set probe_every (40)"
    assert said(0.353, val_every=20, probe_every=0) == f"{took}: raise --val_every (20)"
    assert said(0.353, val_every=200, probe_every=1000) == took, "of a short run nothing can be left out"
    assert said(0.02, val_every=20, probe_every=40) == "measurements on held-out cases took 2.0% of the time"
