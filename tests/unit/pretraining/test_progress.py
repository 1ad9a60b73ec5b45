"""The progress bar of a run."""

import re

from nnunet_mim.system import progress


def test_a_log_file_holds_few_states_and_the_last_one(write_dataset, small_runs, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHOWN_EVERY_S", 0.5)
    write_dataset(n=2)
    assert small_runs.here("-o", "run", "--iterations", "25", "--val_every", "25", "--set", "val_crops=1") == 0
    said = capsys.readouterr().err
    states = re.findall(r"(\d+)/25 ", said)
    assert "\r" not in said
    assert states[-1] == "25"
    assert len(states) < 25
