"""`--dry-run`: a few real steps, figures of the whole run, and nothing left behind."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric

from nnunet_mim.config import PretrainConfig
from nnunet_mim.pretraining import cli, step
from nnunet_mim.pretraining.dry_run import GIB, _duration, _largest_batch, _Trial, _what_fits
from nnunet_mim.pretraining.options import RunOptions
from nnunet_mim.pretraining.step import PROBE_VIEWS


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


@dataclass(frozen=True)
class OneRun:
    config: PretrainConfig
    options: RunOptions


def make_run(config):
    """A run with its passes not set, as on a GPU."""
    return OneRun(config, RunOptions())


def largest(config, used, views_per_pass=32):
    """Of 16 GiB, nine tenths of which may be filled; used(crops) is what a step of so many takes."""
    run = SimpleNamespace(config=config, options=RunOptions(views_per_pass=views_per_pass))
    here = config.batch_size
    trials = (_Trial(1, 1, used(n), used(n), 1) for n in (here, 2 * here))
    return _largest_batch(run, *trials, Fabric(accelerator="cpu", devices=1))


@pytest.fixture
def memory_of_16_gib(monkeypatch):
    monkeypatch.setattr("nnunet_mim.pretraining.dry_run.physical_memory", lambda: 16 * GIB)


KEPT = {(4, 4): 4 * (21 * 96**3 + 2 * 192**3), (1, 1): 4 * (3 * 96**3 + 2 * 192**3)}
"""bytes of a crop during the whole step: its views, and the crop before and after padding"""


def test_the_largest_batch_by_hand(memory_of_16_gib):
    """Passes are full. 2 crops take 3 GiB, 4 take 5: 1 GiB a crop, and 14.4 GiB leave room for 4 + 9."""
    config = PretrainConfig(batch_size=2)
    assert largest(config, lambda crops: (1 + crops) * GIB) == 13
    assert largest(config, lambda crops: 3 * GIB) == 4 + int(11.4 * GIB / KEPT[4, 4])


@pytest.mark.parametrize("n_children", [(4, 4), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_the_largest_batch_does_not_depend_on_the_batch_asked_about(memory_of_16_gib, n_children, batch):
    """Activations of a view take 0.2 GiB, in passes of at most 32; that growth ends where passes are full."""
    views = n_children[0] * n_children[1]
    used = lambda crops: int(0.2 * GIB * min(32, views * crops) + KEPT[n_children] * crops)  # noqa: E731
    fits = (14.4 - 6.4) * GIB // KEPT[n_children]
    found = largest(PretrainConfig(batch_size=batch, n_children=n_children), used)
    assert used(found) <= 14.4 * GIB
    assert found == pytest.approx(fits, rel=0.06)


@pytest.mark.parametrize("n_children", [(4, 4), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_passes_that_grow_are_asked_about_as_small_ones(memory_of_16_gib, monkeypatch, n_children, batch):
    """A view takes 0.2 GiB; steps of all views at once would fill the memory, and say nothing of what would fit."""
    views, asked = n_children[0] * n_children[1], []

    def tried(run, fabric, steps):
        asked.append(run.options.views_per_pass)
        crops = run.config.batch_size
        bytes_used = int(0.2 * GIB * min(run.options.views_per_pass, views * crops) + KEPT[n_children] * crops)
        return _Trial(1, 1, bytes_used, bytes_used, 1)

    monkeypatch.setattr("nnunet_mim.pretraining.dry_run._try", tried)
    config = PretrainConfig(batch_size=batch, n_children=n_children)
    run, full = make_run(config), _Trial(1, 1, 15 * GIB, 15 * GIB, 1)
    said = _what_fits(run, full, Fabric(accelerator="cpu", devices=1))
    assert asked == [PROBE_VIEWS] * 2
    assert said.endswith("crops fit (in passes of 8 views; larger ones where they fit)")
    found = int(re.search(r"about (\d+) crops", said)[1])
    fits = (14.4 * GIB - 0.2 * GIB * PROBE_VIEWS) / KEPT[n_children]
    assert found == pytest.approx(fits, rel=0.06)


def test_twice_the_batch_may_not_fit(memory_of_16_gib):
    assert largest(PretrainConfig(batch_size=2), lambda crops: 4 * crops * GIB) == 3


@pytest.mark.parametrize(
    ("full_from", "text"), [(4, "2 crops fit, 4 do not"), (2, "hold a step of 2 crops: add --recompute 1 2 3")]
)
def test_memory_that_is_full_ends_no_dry_run(write_dataset, small_runs, capsys, monkeypatch, full_from, text):
    """The step is real but for the memory, which ends at so many crops."""
    write_dataset(n=2)
    real = step.ordinary_step

    def with_little_memory(*arguments):
        function = real(*arguments)

        def limited(views):
            if len(views[0].images) >= full_from:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(views)

        return limited

    monkeypatch.setattr("nnunet_mim.pretraining.dry_run.SECONDS", 0.1)
    monkeypatch.setattr(step, "ordinary_step", with_little_memory)
    assert small_runs.here("-o", "run", "--iterations", "1000", "--dry-run", "--batch", "2") == 0
    assert text in figures(capsys.readouterr().out)["batch"]


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
