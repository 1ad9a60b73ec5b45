"""mim_inspect on checkpoints whose metadata are changed at random: a description or one line, never a traceback."""

from __future__ import annotations

import copy
import re
from functools import reduce
from operator import getitem

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.inspection.cli import main
from nnunet_mim.pretraining.report.summary import Facts

JUNK = (
    None, True, 0, -1, 1, 3, 10**9, 2**70, 10**5000, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "all", "0",
    "x" * 500, "\x1b[2J\n", "é", "CTNormalization", [], {}, [[]], [1], [0, 0, 0], [3.0, 3.0, 3.0], [2, 1, 0],
    ["a", "b"], {"0": {}}, {"a": 1}, {0: 1}, [{"dataset": "D", "case": "c", "sha256": ""}], [None], [[[1]]], (1, 2, 3),
    b"bytes", "resenc", "cosine", [96, 96, 96], [32] * 3, [0.5], torch.ones(2), {"mean": 0.0, "std": 0.0},
)  # fmt: skip
DOCUMENTS = ("mim_config", "provenance", "nnssl_adaptation_plan", "mim_version")
NAMES = ("", "x", "all", "\x1b[2J\n", "val/probe/dice_99999", "datasets_")
SHARES = st.floats(0, 1, exclude_max=True)
KINDS = st.sampled_from(["delete", "rename", "exchange", "replace", "replace", "replace"])
CHANGE = st.tuples(KINDS, SHARES, SHARES, st.sampled_from(range(len(JUNK))), st.sampled_from(NAMES))


def mutate(junk, stored, changes):
    """The documents with values deleted, renamed, exchanged or replaced."""
    content = {name: stored[name] for name in DOCUMENTS}
    for kind, share, other, number, name in changes:
        if not content:
            break
        *above, key = junk.at(content, share)
        parent = reduce(getitem, above, content)
        if kind == "delete":
            content = junk.put(content, (*above, key), ...)
        elif kind == "rename" and isinstance(parent, dict):
            content = junk.put(junk.put(content, (*above, key), ...), (*above, name), parent[key])
        elif kind == "exchange":
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            taken = keys[int(other * len(keys))]
            content = junk.put(junk.put(content, (*above, key), parent[taken]), (*above, taken), parent[key])
        else:
            content = junk.put(content, (*above, key), JUNK[number])
    return {"network_weights": stored["network_weights"], **content}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A checkpoint with a history, as a dict."""
    from nnunet_mim.checkpoint.format import build_checkpoint
    from nnunet_mim.config import NetworkConfig, PretrainConfig
    from nnunet_mim.networks.mask_in_mask import MaskInMask

    network = NetworkConfig((6, 6, 6, 12), (1, 1, 1, 1), 2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2)
    window = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}
    row = {"val/loss": 1.5, "val/level1/reconstruction": 0.8, "baseline/level1/token_mean": 1.0, "val/probe/dice": 0.3,
           "baseline/level1/infill": 0.9, "val/probe/dice_1": 0.3, "val/Dataset900_Tiny/level1": 0.8,
           "val/level1/alignment_top1": 0.5, "val/feature_rank": 5.0, "val/feature_std": 0.5}  # fmt: skip
    provenance = {
        "datasets": ["Dataset900_Tiny"], "plans_name": "tinyPlans", "configuration": "3d_fullres", "fold": 0,
        "spacing": [3.0, 2.5, 4.0], "transpose_forward": [0, 1, 2], "normalization": ["CTNormalization"],
        "intensity_properties": {"0": window}, "iterations": 1750, "image_reader_writer": "SimpleITKIO",
        "loss_history": [{"iteration": 250.0 * i, **{k: v - i / 50 for k, v in row.items()}} for i in range(8)],
        "cases": [{"dataset": "Dataset900_Tiny", "case": f"case_{i}", "sha256": "0"} for i in range(3)],
        "crops_seen": {"Dataset900_Tiny": 30}, "skipped_steps": [],
    }  # fmt: skip
    config = PretrainConfig(preset="tiny", network=network, view_size=(32, 32, 32), iterations=2000)
    return build_checkpoint(MaskInMask(network, 1).state_dict(), config, provenance)


def inspected(stored, folder, capsys):
    """Exit code of mim_inspect, which says a description or one line."""
    path = folder / "checkpoint_final.pth"
    torch.save(stored, path)
    capsys.readouterr()
    code = main([str(path)])
    out, err = capsys.readouterr()
    assert code in (0, 2)
    assert all(line.isprintable() for line in out.split("\n"))
    if code:
        assert out == ""
        assert re.fullmatch(r"error: .*checkpoint_final\.pth.*\n", err)
    else:
        assert err == ""
        assert "to finetune from it" in out
    return code


def test_what_is_mutated_is_described(valid, tmp_path, capsys):
    assert inspected(valid, tmp_path, capsys) == 0


def test_mutations(valid, tmp_path, capsys, junk, examples):
    codes = []

    @examples(30, 1000)
    @given(changes=st.lists(CHANGE, min_size=1, max_size=3))
    def holds(changes):
        codes.append(inspected(mutate(junk, valid, changes), tmp_path, capsys))

    holds()
    if len(codes) >= 1000:
        assert 50 < sum(code == 0 for code in codes) < 950, "some are described and some refused"


def test_a_measurement_without_its_iteration(valid, tmp_path, capsys):
    """Found by the test below."""
    stored = copy.deepcopy(valid)
    stored["provenance"]["loss_history"][3]["iteration"] = None
    assert inspected(stored, tmp_path, capsys) == 2


@pytest.mark.parametrize("change", ["no intensities", "no channel", "no field", "None", "NaN", "std 0", "infinite std"])
def test_a_channel_without_intensities_is_named(valid, tmp_path, capsys, change):
    stored = copy.deepcopy(valid)
    properties = stored["provenance"]["intensity_properties"]
    if change == "no intensities":
        del stored["provenance"]["intensity_properties"]
    elif change == "no channel":
        properties["1"] = properties.pop("0")
    elif change == "no field":
        del properties["0"]["percentile_99_5"]
    else:
        value = {"None": None, "NaN": float("nan"), "std 0": 0.0, "infinite std": float("inf")}[change]
        properties["0"]["std"] = value
    path = tmp_path / "checkpoint_final.pth"
    torch.save(stored, path)
    assert main([str(path)]) == 2
    line = capsys.readouterr().err
    assert ("provenance has no intensity_properties" if change == "no intensities" else "channel 0 is CT") in line
    assert line.count("\n") == 1


def test_keys_that_only_a_description_needs_may_be_missing_in_finetuning(valid, tmp_path):
    stored = copy.deepcopy(valid)
    del stored["provenance"]["loss_history"], stored["provenance"]["plans_name"]
    path = tmp_path / "checkpoint_final.pth"
    torch.save(stored, path)
    with pytest.raises(Exception, match="provenance has no plans_name, loss_history"):
        Facts(load_checkpoint(path), path)
