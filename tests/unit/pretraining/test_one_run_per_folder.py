"""Two runs never write to one folder."""

from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining import loop


def test_a_second_run_on_a_folder_is_refused_while_the_first_writes(write_dataset, small_runs, capsys, monkeypatch):
    """Both would write the same figures and checkpoints."""
    write_dataset(n=6)
    inside = []

    def pretrain(job, fabric):
        inside.append(job)
        assert small_runs.here("-o", "run", "--iterations", "2") == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "another mim_pretrain writes to" in message
        assert str(small_runs.folder("run")) in message
        raise MiMError("stopped here")

    monkeypatch.setattr(loop, "pretrain", pretrain)
    assert small_runs.here("-o", "run", "--iterations", "2") == 2
    assert len(inside) == 1
