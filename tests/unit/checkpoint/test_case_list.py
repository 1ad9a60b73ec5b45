"""A long list of cases lies beside the checkpoint, and everything reads it as if it were inside."""

import json

import pytest
import torch

from nnunet_mim.benchmarking.guard import provenance_of
from nnunet_mim.checkpoint import case_list
from nnunet_mim.checkpoint.case_list import NAME, put_aside, put_back
from nnunet_mim.checkpoint.format import PretrainedCheckpoint, load_checkpoint, save_atomically
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.export_cli import main

CASES = [{"dataset": "Dataset900_Tiny", "case": f"Müller_{n}", "sha256": f"{n:064x}"} for n in range(5)]


@pytest.fixture
def saved(make_checkpoint, tmp_path, monkeypatch):
    """A checkpoint in a folder of its own, saved twice as a run does, with its list beside it."""
    monkeypatch.setattr(case_list, "MOST_INSIDE", 4)
    content = torch.load(make_checkpoint(tmp_path / "whole.pth", cases=CASES)[0], weights_only=True)
    run = tmp_path / "run"
    run.mkdir()
    save_atomically(content, run / "checkpoint_latest.pth")
    (path,) = run.glob("cases_*")
    stamp = path.stat().st_mtime_ns
    save_atomically(content, run / "checkpoint_final.pth")
    assert [p.stat().st_mtime_ns for p in run.glob("cases_*")] == [stamp], "it is written once"
    assert content["provenance"]["cases"] == CASES, "what the run holds is not changed"
    return run / "checkpoint_final.pth", path


def test_every_reader_has_the_cases(saved):
    path, _ = saved
    assert torch.load(path, weights_only=True)["provenance"]["cases"] == []
    readers = (load_checkpoint(path)["provenance"], provenance_of(path), PretrainedCheckpoint.load(path).provenance)
    for provenance in readers:
        assert provenance["cases"] == CASES
        assert "cases_file" not in provenance


def test_few_cases_stay_in_the_checkpoint(make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(case_list, "MOST_INSIDE", 5)
    content = torch.load(make_checkpoint(cases=CASES)[0], weights_only=True)
    save_atomically(content, tmp_path / "run.pth")
    assert torch.load(tmp_path / "run.pth", weights_only=True)["provenance"] == content["provenance"]
    assert not list(tmp_path.glob("cases_*"))


def test_an_export_holds_the_list_without_names(saved, tmp_path):
    path, _ = saved
    # what an export needs beside: settings that were left out of the small checkpoint
    content = torch.load(path, weights_only=True)
    content["provenance"] |= {"plans_name": "plans", "configuration": "3d_fullres", "fold": "all", "loss_history": []}
    torch.save(content, path)
    assert main([str(path), "-o", str(tmp_path / "shared")]) == 0
    (beside,) = (tmp_path / "shared").glob("cases_*")
    assert NAME.fullmatch(beside.name)
    assert "Müller" not in beside.read_text()
    assert json.loads((tmp_path / "shared" / "config.json").read_text())["provenance"]["cases"] == []
    assert load_checkpoint(tmp_path / "shared")["provenance"]["cases"] == [{**record, "case": ""} for record in CASES]


def test_a_list_that_is_missing_is_named(saved, tmp_path):
    path, beside = saved
    beside.rename(tmp_path / "elsewhere")
    message = f"trained on 5 cases, which are listed in {beside.name}, and .*{beside.name} does not exist: copy it"
    with pytest.raises(MiMError, match=message):
        load_checkpoint(path)
    (tmp_path / "elsewhere").rename(beside)
    assert len(load_checkpoint(path)["provenance"]["cases"]) == 5


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-10], lambda b: b + b"{}\n", lambda b: b.replace(b"a", b"b"), lambda b: b"", lambda b: b * 9000],
)
def test_a_damaged_list_is_refused(saved, damage):
    path, beside = saved
    beside.write_bytes(damage(beside.read_bytes()))
    with pytest.raises(MiMError, match=rf"cannot read .*{beside.name} \(it .*\): copy it again"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "named",
    [
        {"name": "../cases_0123456789abcdef.jsonl"}, {"name": "/etc/passwd"}, {"records": "many"}, {"records": None},
        {"name": None}, "cases", [], {"sha256": None, "name": 3},
    ],
)  # fmt: skip
def test_what_names_no_list_is_refused(tmp_path, named):
    stored = put_aside({"cases": CASES * 3000}, tmp_path)
    stored["cases_file"] = {**stored["cases_file"], **named} if isinstance(named, dict) else named
    with pytest.raises(MiMError, match=r"^x\.pth: cases_file in provenance names no list of cases: take another copy$"):
        put_back(stored, tmp_path.joinpath("x.pth").relative_to(tmp_path), tmp_path)
