"""A process that reads crops and is killed, as Linux does where memory runs out."""

import os
import signal

from nnunet_mim.pretraining.data.crops import CropDataset


def test_a_killed_reader_ends_the_run_in_one_line(write_dataset, small_runs, capsys, monkeypatch):
    write_dataset(n=6)
    parent, read = os.getpid(), CropDataset.__getitem__

    def killed(dataset, number):
        if os.getpid() != parent and number >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(dataset, number)

    monkeypatch.setattr(CropDataset, "__getitem__", killed)
    assert small_runs.here("-o", "run", "--iterations", "40", workers="1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: a process that reads crops has ended")
    assert "killed by signal" in line
    assert "lower --workers" in line
