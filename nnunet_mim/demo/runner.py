"""Run the stages one after the other, as child processes, with logs, times and a record of finished stages."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from nnunet_mim.demo.stages import DemoSettings, Folders, Stage
from nnunet_mim.demo.watching import watched
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import checked, document
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.processes import run_command
from nnunet_mim.system.untrusted import read_json

STATE_FILE = "demo.json"


@document
class DoneStage(TypedDict):
    """An entry of `stages` in demo.json."""

    name: str
    title: str
    command: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    cpu_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@document
class State(TypedDict):
    """demo.json."""

    settings: dict[str, Any]
    device: str
    stages: list[DoneStage]


STATE = TypeAdapter(State)


def open_folder(folder: Path, settings: DemoSettings, device: str, resume: bool) -> dict[str, Any]:
    """Check that the demonstration may write into its folder, and read or make its record.

    The record holds `settings`, `device` and `stages`: name, title, command, seconds and cpu_seconds of each finished
    stage.
    """
    wanted = {"settings": json.loads(json.dumps(asdict(settings))), "device": device}
    file = folder / STATE_FILE
    if resume:
        if not file.is_file():
            raise MiMError(f"nothing to continue in {folder}: leave out --continue")
        remedy = f"delete {folder} and start anew"
        state = checked(str(file), read_json(file, remedy), STATE, remedy)
        if {name: state.get(name) for name in wanted} != wanted:
            raise MiMError(f"{folder} was started with other options: give the same --quick, --bodies, -device again")
        return state
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MiMError(f"{folder} exists and is not empty: continue with --continue, or choose another folder with -o")
    state = {**wanted, "stages": []}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_state(folder, state)
    except OSError as error:
        raise MiMError(f"cannot write into {folder} ({error}): choose another folder with -o") from error
    return state


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    write_atomically(folder / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())


def run_stages(stages: Sequence[Stage], folders: Folders, state: dict[str, Any], say: Callable[[str], None]) -> None:
    """Run every stage that is not done yet; `state` is extended and written after each, `say` prints one line."""
    folders.logs.mkdir(parents=True, exist_ok=True)
    done = {stage["name"]: stage for stage in state["stages"]}
    for number, stage in enumerate(stages, start=1):
        say(f"[{number}/{len(stages)}] {stage.title}")
        if stage.name in done:
            say(f"      done before, in {done[stage.name]['seconds']:.0f} s")
            continue
        if stage.output.is_dir():
            shutil.rmtree(stage.output)
        stage.output.unlink(missing_ok=True)
        log = folders.logs / f"{number:02d}_{stage.name}.log"
        command = ""
        wall, cpu = time.perf_counter(), sum(os.times()[:4])  # user and system, of this process and ended children
        if isinstance(stage.run, list):
            command = shlex.join(stage.run)
            say(f"      {command}")
            log.unlink(missing_ok=True)
            typed = [find_command(stage.run[0]), *stage.run[1:]]
            with watched(log, state["settings"]["epochs"]):
                code = run_command(typed, log, _child_environment(folders))
            if code:
                for line in _last_lines(log):
                    say(f"      | {line}")
                raise MiMError(
                    f"stage {stage.name} failed (exit code {code}), its output is in {log}; to try again: "
                    f"mim_demo -o {folders.root} --continue"
                )
        else:
            stage.run()
            log.write_text(f"{stage.title}: {stage.output}\n")
        times = {"seconds": time.perf_counter() - wall, "cpu_seconds": sum(os.times()[:4]) - cpu}
        say(f"      {times['seconds']:.0f} s")
        record = {"name": stage.name, "title": stage.title, "command": command}
        state["stages"].append({**record, **{name: round(seconds, 1) for name, seconds in times.items()}})
        _write_state(folders.root, state)


def _child_environment(folders: Folders) -> dict[str, str]:
    """This process's environment, with nnU-Net's folders and settings for a small machine and a short run."""
    environment = dict(os.environ)
    for name in ("nnUNet_mim_checkpoint", "NNUNET_MIM_NO_AUTOREGISTER"):  # they would change the finetuning
        environment.pop(name, None)
    return {
        "GOMP_SPINCOUNT": "30000",  # waiting threads soon leave their core to the process that prepares the data
        **environment,
        **folders.environment(),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",  # every process of nnU-Net's pools takes ten seconds to start
        "nnUNet_compile": "F",
        "PYTHONUNBUFFERED": "1",
    }


def find_command(name: str) -> str:
    """Path of a command installed beside the running Python. Raises MiMError where there is none."""
    places = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise MiMError(f"command {name} not found beside {sys.executable}: install nnunet_mim with pip and try again")
    return found


def _last_lines(log: Path, count: int = 12) -> list[str]:
    """The last lines of a log that are not empty, of a progress bar its last state."""
    text = log.read_bytes().decode(errors="replace")
    lines = [line.rstrip().split("\r")[-1] for line in text.split("\n")]
    return [line for line in lines if line][-count:]
