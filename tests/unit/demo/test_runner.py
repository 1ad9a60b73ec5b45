"""Stages run once, in order, as commands whose failures are told in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_mim.demo.runner import _child_environment, _last_lines, find_command, open_folder, run_stages
from nnunet_mim.demo.stages import QUICK, Folders, Stage, make_stages
from nnunet_mim.errors import MiMError
from nnunet_mim.system.processes import run_command

PYTHON = Path(sys.executable).name


def stage(name: str, program: str, output: Path) -> Stage:
    return Stage(name, f"Do {name}", [PYTHON, "-c", program], output)


def test_stages_run_in_order_and_only_once(tmp_path) -> None:
    folders, said = Folders(tmp_path), []
    made = tmp_path / "made.txt"
    stages = [
        Stage("first", "Do first", lambda: made.write_text("1"), made),
        stage("second", f"print('hello'); open({str(made)!r}, 'a').write('2')", tmp_path / "none"),
    ]
    state = open_folder(tmp_path, QUICK, "cpu", resume=False)
    run_stages(stages, folders, state, said.append)
    assert made.read_text() == "12"
    assert (tmp_path / "logs" / "02_second.log").read_text() == "hello\n"
    assert said[0] == "[1/2] Do first"
    assert any(line.strip().startswith(f"{PYTHON} -c") for line in said)

    state = open_folder(tmp_path, QUICK, "cpu", resume=True)
    assert [s["name"] for s in state["stages"]] == ["first", "second"]
    assert all(s["seconds"] >= 0 and s["cpu_seconds"] >= 0 for s in state["stages"])
    run_stages(stages, folders, state, said.append)
    assert made.read_text() == "12"


def test_a_failing_stage_is_told_and_can_be_tried_again(tmp_path) -> None:
    said: list[str] = []
    output = tmp_path / "half"
    program = f"import os; os.mkdir({str(output)!r}); print('x\\ry'); print('the reason'); raise SystemExit(3)"
    state = open_folder(tmp_path, QUICK, "cpu", resume=False)
    with pytest.raises(MiMError, match=r"stage bad failed \(exit code 3\), .*01_bad.log.*--continue"):
        run_stages([stage("bad", program, output)], Folders(tmp_path), state, said.append)
    assert said[-2:] == ["      | y", "      | the reason"]
    assert output.is_dir()

    state = open_folder(tmp_path, QUICK, "cpu", resume=True)
    run_stages([stage("bad", "import os; os.mkdir('.') if 0 else None", output)], Folders(tmp_path), state, said.append)
    assert not output.exists()  # what the first try left behind was removed
    assert [s["name"] for s in state["stages"]] == ["bad"]


def test_a_folder_with_something_in_it_is_refused(tmp_path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(MiMError, match="not empty"):
        open_folder(tmp_path, QUICK, "cpu", resume=False)
    with pytest.raises(MiMError, match="not empty"):
        open_folder(tmp_path / "mine.txt", QUICK, "cpu", resume=False)
    with pytest.raises(MiMError, match="nothing to continue"):
        open_folder(tmp_path, QUICK, "cpu", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("settings", "device"), [(replace(QUICK, bodies=7), "cpu"), (QUICK, "cuda")])
def test_continuing_with_other_options_is_refused(tmp_path, settings, device) -> None:
    open_folder(tmp_path / "new", QUICK, "cpu", resume=False)
    with pytest.raises(MiMError, match="other options"):
        open_folder(tmp_path / "new", settings, device, resume=True)


def test_an_unreadable_record_is_told(tmp_path) -> None:
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(MiMError, match=r"demo\.json"):
        open_folder(tmp_path, QUICK, "cpu", resume=True)


def test_last_lines_keep_the_last_state_of_a_progress_bar(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_bytes("a\n\n10 %\r50 %\r100 %\nende \xe9\r\n".encode("latin-1"))
    assert _last_lines(log) == ["a", "100 %", "ende \ufffd"]
    assert _last_lines(log, 1) == ["ende \ufffd"]


def test_missing_command() -> None:
    with pytest.raises(MiMError, match="mim_nonsense not found"):
        find_command("mim_nonsense")


def test_children_see_the_demonstrations_folders_only(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    monkeypatch.setenv("nnUNet_mim_checkpoint", "/elsewhere/checkpoint.pth")
    environment = _child_environment(Folders(tmp_path))
    assert environment["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert "nnUNet_mim_checkpoint" not in environment
    assert os.environ["nnUNet_raw"] == "/elsewhere"


def test_every_command_of_the_demonstration_is_installed(tmp_path) -> None:
    stages = make_stages(QUICK, Folders(tmp_path), "cpu")
    commands = [s.run[0] for s in stages if isinstance(s.run, list)]
    assert "mim_pretrain" in commands
    assert "nnUNetv2_predict" in commands
    for command in commands:
        assert Path(find_command(command)).is_file()


def test_the_record_is_json_a_human_can_read(tmp_path) -> None:
    open_folder(tmp_path / "new", QUICK, "cpu", resume=False)
    assert json.loads((tmp_path / "new" / "demo.json").read_text())["settings"]["quick"] is True


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_interrupting_ends_the_child_and_its_children(tmp_path) -> None:
    pids = tmp_path / "pids"
    grandchild = "import time; time.sleep(300)"
    child = (
        "import subprocess, sys, os, time;"
        f"g = subprocess.Popen([sys.executable, '-c', {grandchild!r}]);"
        f"open({str(pids) + '.tmp'!r}, 'w').write(f'{{os.getpid()}} {{g.pid}}');"
        f"os.rename({str(pids) + '.tmp'!r}, {str(pids)!r}); time.sleep(300)"
    )
    program = (
        "from pathlib import Path; import os; from nnunet_mim.system.processes import run_command;"
        f"run_command([{PYTHON!r}, '-c', {child!r}], Path({str(tmp_path / 'log')!r}), os.environ)"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    try:
        wait_for(pids.is_file)
        started = [int(pid) for pid in pids.read_text().split()]
        runner.send_signal(signal.SIGINT)
        runner.wait(timeout=30)
        wait_for(lambda: not any(is_running(pid) for pid in started))
    finally:
        runner.kill()


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """False for a process that is gone, and for one that has ended and nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_exit_code_of_a_command(tmp_path) -> None:
    assert run_command([PYTHON, "-c", "raise SystemExit(5)"], tmp_path / "log", os.environ) == 5


JUNK = [..., None, True, -1, 5, float("nan"), "x", [], [[]], {}, {"x": 1}]


def test_no_record_ends_in_a_traceback(tmp_path) -> None:
    """Every place of demo.json, with junk in it: taken, or refused in one line."""
    open_folder(tmp_path, QUICK, "cpu", resume=False)
    file, done = tmp_path / "demo.json", {"name": "a", "title": "A", "command": "", "seconds": 1.0, "cpu_seconds": 1.0}
    whole = {**json.loads(file.read_text()), "stages": [done]}
    places = [(), *((key,) for key in whole), ("stages", 0), *(("stages", 0, key) for key in done)]
    for place in places:
        for junk in JUNK[not place :]:
            content = json.loads(json.dumps({"top": whole}))
            *path, last = ("top", *place)
            holder = content
            for key in path:
                holder = holder[key]
            if junk is ...:
                del holder[last]
            else:
                holder[last] = junk
            file.write_text(json.dumps(content["top"]))
            said = str(tmp_path)
            try:
                state = open_folder(tmp_path, QUICK, "cpu", resume=True)
                stages = [Stage("a", "A", lambda: None, tmp_path / "none")] if state["stages"] else []
                run_stages(stages, Folders(tmp_path), state, lambda line: None)
            except MiMError as error:
                said = str(error)
            assert len(said.splitlines()) == 1
            assert str(tmp_path) in said
