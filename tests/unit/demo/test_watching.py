"""How far a command is, from what its log holds."""

import threading
import time

import pytest

from nnunet_mim.demo import watching
from nnunet_mim.demo.watching import position, watched
from nnunet_mim.system import progress


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", None),
        ("reading 3/4 of it\n", None),
        ("checking: 100%|#| 5/5 [00:01<00:00]\npretraining: 12%|# | 34/280 [00:10<01:12, L1=0.9]", (34, 280)),
        ("a: 10%|# | 1/10 [00:01<00:09]\ra: 20%|## | 2/10 [00:02<00:08]", (2, 10)),
        ("Epoch 0 \n...\n2026-11-29 10:00: Epoch 3 \n2026-11-29 10:00: Current learning rate: 0.002\n", (3, 7)),
        ("Epoch 6 \n predicting\n 33%|###  | 1/3 [00:05<00:10, 5.0s/it]", (1, 3)),
    ],
)
def test_position(tmp_path, text, wanted):
    log = tmp_path / "log"
    assert position(log, 7) is None, "no file yet"
    log.write_text(text)
    assert position(log, 7) == wanted


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    log = tmp_path / "log"
    log.write_text("1/9 [\n" + "x" * 2 * watching.LOOKED_AT)
    assert position(log, 7) is None


def test_a_line_says_how_far_the_command_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watching, "SECONDS", 0.02)
    monkeypatch.setattr(progress, "SHOWN_EVERY_S", 0.01)
    log = tmp_path / "log"
    with watched(log, 7):
        for n in (1, 2, 3):
            log.write_text(f"{n}/4 [")
            time.sleep(0.15)
    said = capsys.readouterr().err
    assert "3/4 [" in said
    assert "\r" not in said
    assert "watching" not in [thread.name for thread in threading.enumerate()]
