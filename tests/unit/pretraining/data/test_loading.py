"""How many processes read crops, and how far ahead."""

import os
from types import SimpleNamespace

import pytest
import torch

from nnunet_mim.config import PretrainConfig
from nnunet_mim.pretraining import options
from nnunet_mim.pretraining.data.loading import _batches_ahead, _collate_half, training_batches
from nnunet_mim.pretraining.distributed.ranks import ALONE
from nnunet_mim.pretraining.options import RunOptions, _default_workers
from nnunet_mim.system import machine

GB = 10**9


@pytest.mark.parametrize(
    ("cores", "devices", "workers"), [(16, 1, 12), (8, 1, 7), (16, 2, 7), (16, 8, 1), (2, 4, 1), (128, 8, 12)]
)
def test_workers_share_the_cores_beside_gpus(monkeypatch, cores, devices, workers):
    monkeypatch.setattr(options, "usable_cores", lambda: cores)
    assert _default_workers("cuda", devices) == workers
    assert _default_workers("cpu", devices) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_are_those_of_this_process():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert machine.usable_cores() == len(before)


def test_limits_of_a_container(monkeypatch, tmp_path):
    """As docker -m 4g --cpus 1.5 sets them; without limits nothing changes."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    cores, memory = machine.usable_cores(), machine.physical_memory()
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert (machine.usable_cores(), machine.physical_memory()) == (cores, memory)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{4 * GB}\n")
    assert (machine.usable_cores(), machine.physical_memory()) == (1, 4 * GB)


def test_batches_ahead_take_a_quarter_of_the_memory():
    """12 workers with 100 MB a batch: 4 each are 4.8 GB, of 64 GB a quarter is more, of 12 GB it is enough for 2."""
    assert _batches_ahead(12, GB // 10, 1, 64 * GB) == 4
    assert _batches_ahead(12, GB // 10, 1, 12 * GB) == 2
    assert _batches_ahead(12, GB // 10, 2, 12 * GB) == 1
    assert _batches_ahead(12, GB, 8, 12 * GB) == 1
    assert _batches_ahead(12, GB, 8, 0) == 4


def test_crops_on_their_way_to_a_gpu_are_float16_and_keep_a_hounsfield_unit():
    """Normalised voxels, HU / 250; boxes and numbers of cases stay as they are."""
    hounsfield = torch.arange(-1024, 1000, dtype=torch.float32)
    item = hounsfield / 250, torch.tensor([[0, 300]] * 3), torch.full((3,), 70_000)
    crops, valid, missed = _collate_half([item, item])
    assert crops.dtype == torch.float16
    assert float((crops[1].float() * 250 - hounsfield).abs().max()) <= 0.5
    assert valid.dtype == missed.dtype == torch.int64
    assert torch.equal(missed[0], item[2])


@pytest.mark.parametrize(
    ("device", "precision", "half"),
    [("cuda", "bf16-mixed", True), ("cuda", "32-true", False), ("cpu", "bf16-mixed", False)],
)
def test_when_crops_travel_as_float16(monkeypatch, device, precision, half):
    made = {}

    class Loader:
        def __init__(self, dataset, **options):
            made.update(options)

        def __iter__(self):
            return iter([])

    monkeypatch.setattr("nnunet_mim.pretraining.data.loading.DataLoader", Loader)
    dataset, chosen = SimpleNamespace(crop_size=(8, 8, 8)), RunOptions(precision=precision, workers=0)
    batches = training_batches(dataset, PretrainConfig(iterations=1), 0, chosen, torch.device(device), ALONE)
    assert list(batches) == []
    assert (made["collate_fn"] is _collate_half) == half
