"""report.html of a run: complete, and about the right cases."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from nnunet_mim.checkpoint.format import build_checkpoint, run_provenance
from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.nnunet.orientation import Orientation
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.pretraining.data import run_data as runs
from nnunet_mim.pretraining.data.crops import read_crop
from nnunet_mim.pretraining.report import page as run_report
from nnunet_mim.pretraining.report.page import _case_orientation, _reconstruct_case, _shown_cases, write_run_report
from nnunet_mim.pretraining.report.pictures import load_network
from nnunet_mim.pretraining.report.summary import Facts

NETWORK = NetworkConfig((6, 6, 6, 12), (1, 1, 1, 1), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture
def run(write_dataset, tmp_path):
    """(folder, checkpoint, data) of a run on made-up bodies that has hardly begun."""
    write_dataset(n=10, shape=(48, 40, 44), spacing=(6.0, 4.0, 5.0))
    config = PretrainConfig(preset="tiny", network=NETWORK, view_size=(32, 32, 32), val_cases=4, iterations=1000)
    source = find_source("900", "tinyPlans", "3d_fullres")
    data = runs.run_data(runs.index_sources([source])[0], 0, config)
    torch.manual_seed(0)
    history = [
        {"iteration": 250 * i, "val/loss": 2.0, "val/level1/reconstruction": 1 - i / 20, "baseline/level1/infill": 0.9}
        for i in range(4)
    ]
    provenance = run_provenance(data.sources, data.train.records(), 0, 750, history)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.csv").write_text("iteration,train/level1/reconstruction,lr\n10,1.0,0.1\n20,0.9,0.2\n")
    return folder, build_checkpoint(MaskInMask(NETWORK).state_dict(), config, provenance), data


def test_page(run) -> None:
    folder, checkpoint, data = run
    write_run_report(folder, checkpoint, data)
    text = (folder / "report.html").read_text()
    assert '<p class="lead">Learning: from iteration 0 to 750 the held-out loss fell by' in text
    shown = sorted({data.val[0].info.case, data.val[-1].info.case})
    assert len(data.val) == 2
    assert sorted(re.findall(r"<h2>Case (\w+)</h2>", text)) == shown
    assert text.count("<img ") == 4  # curves, two cases, comparison
    assert "Dataset900_Tiny: 8 cases trained on, 2 held out" in text
    assert "384 × 256 × 320" in text  # mm of level 1, array order
    assert "mean and standard deviation of each token are put back" in " ".join(text.split())
    assert "nnUNetv2_train 900 3d_fullres 0 -tr nnUNetTrainerMiM -p tinyPlans" in text
    assert '<tr class="marked"><td>iterations</td><td>1000</td><td>250000</td>' in text
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "train.csv"]


def test_pictures_are_those_of_the_case(run) -> None:
    _, checkpoint, data = run
    case = data.val[0]
    first = _reconstruct_case(load_network(checkpoint), Facts(checkpoint), case)[0]
    assert first.start == (-8, -12, -10)  # a body of 48 x 40 x 44 voxels in the middle of 64
    crop, valid = read_crop(case, np.array(first.start), np.array((64, 64, 64)))
    expected = np.full_like(crop[0], -1000)
    inside = tuple(slice(*bounds) for bounds in valid)
    expected[inside] = crop[0][inside] * 250
    pooled = expected.reshape(32, 2, 32, 2, 32, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(first.input, pooled, atol=0.01)
    shown = _shown_cases(Facts(checkpoint), data, "cpu")
    assert list(shown) == [c.info.case for c in data.val]
    assert shown[case.info.case][0].spacing == (12, 8, 10)


def test_orientation_follows_the_plans(run) -> None:
    case = run[2].val[0]
    assert _case_orientation(case) == Orientation()  # nothing is known of the direction of made-up cases
    case.source.plans["transpose_forward"] = [1, 0, 2]
    assert _case_orientation(case) == Orientation((1, 0, 2))


def test_a_failure_is_a_note(run, capsys) -> None:
    folder, checkpoint, data = run
    (folder / run_report.REPORT).mkdir()
    write_run_report(folder, checkpoint, data)
    said = capsys.readouterr().out
    assert said.startswith("note: ")
    assert said.count("\n") == 1
