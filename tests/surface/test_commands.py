"""Flags, arguments and exit codes of every command."""

import argparse

import pytest

COMMANDS = (
    "mim_benchmark", "mim_classify", "mim_convert", "mim_demo", "mim_export", "mim_inspect", "mim_plan", "mim_prepare",
    "mim_pretrain",
)  # fmt: skip
BAD_INPUT = {
    "mim_benchmark": ["run", "missing.yaml"],
    "mim_classify": ["report", "-d", "999", "--target", "sick"],
    "mim_convert": ["missing.pth", "-o", "out.pth"],
    "mim_demo": ["--bodies", "1", "-o", "demo"],
    "mim_export": ["missing.pth", "-o", "export"],
    "mim_inspect": ["missing.pth"],
    "mim_plan": ["-d", "999"],
    "mim_prepare": ["-d", "999"],
    "mim_pretrain": ["-d", "999", "-device", "cpu"],
}


REMOVED = {"mim_pretrain": {"--shard", "--no-compile"}}
"""option strings that are gone on purpose, see CHANGELOG.md"""
ADDED = {
    "mim_benchmark": {"few_shot"},
    "mim_classify report": {"--saliency", "-device"},
    "mim_classify train": {"--labelled"},
    "mim_demo": {"--ct"},
    "mim_export": {"--half"},
    "mim_inspect": {"--list_weights"},
    "mim_prepare": {"--slurm"},
    "mim_pretrain": {"--decoder", "--decoder_phase", "--trust_index"},
}
"""flags and subcommands that came later; a second spelling of a flag is no new one"""


class ParserFoundError(Exception):
    """Carries the parser of a command out of it."""


@pytest.fixture
def parser_of(command, monkeypatch):
    def capture(self, *arguments, **options):
        raise ParserFoundError(self)

    def find(name):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        with pytest.raises(ParserFoundError) as found:
            command(name)
        return found.value.args[0]

    return find


def surface_of(parser):
    """Option strings or positional argument → nargs and choices; name of a subcommand → the same of it."""
    surface = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            surface |= {name: surface_of(subparser) for name, subparser in action.choices.items()}
        else:
            choices = None if action.choices is None else list(action.choices)
            surface[" ".join(action.option_strings) or action.dest] = {"nargs": action.nargs, "choices": choices}
    return surface


def test_the_commands_are_these(scripts):
    assert sorted(scripts) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_and_arguments(parser_of, frozen, name):
    """Every spelling that there was is there, with the same number of values and the same choices."""
    frozen("flags.json", name, surface_of(parser_of(name)), lambda found, stored: compare(name, found, stored))


def compare(name, found, stored):
    """The surface of a command, or of a subcommand (`mim_classify report`), beside the frozen one."""
    by_spelling = {spelling: flag for flag in found for spelling in flag.split()}
    for flag, kind in stored.items():
        spellings = set(flag.split()) - REMOVED.get(name, set())
        assert spellings <= set(by_spelling), flag
        for spelling in spellings:
            if "nargs" in kind:
                assert found[by_spelling[spelling]] == kind, flag
            else:
                compare(f"{name} {spelling}", found[by_spelling[spelling]], kind)
    old = {spelling for flag in stored for spelling in flag.split()}
    new = {flag for flag in found if old.isdisjoint(flag.split())}
    assert new <= ADDED.get(name, set())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_0(command, capsys, name):
    with pytest.raises(SystemExit) as ended:
        command(name, "--help")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: {name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_input_ends_with_2_and_one_line(work, command, capsys, name):
    assert command(name, *BAD_INPUT[name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_a_flag_that_is_not_there_ends_with_2(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command("mim_pretrain", "-d", "901", "--no_such_flag")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: mim_pretrain does not take --no_such_flag")


def test_a_run_stopped_by_sigterm_ends_with_75_and_can_be_continued(small_run):
    assert small_run.stopped.returncode == 75, small_run.stopped.stdout
    assert small_run.stopped.stdout.splitlines()[-1] == "stopped after 2 of 4 iterations: continue with --c"
    assert "Traceback" not in small_run.stopped.stdout
    assert small_run.continued.returncode == 0, small_run.continued.stdout


def test_what_exists_is_not_overwritten(small_run, same_numbers, small, command, monkeypatch, capsys):
    for name, value in same_numbers.environment(same_numbers.ROOT, small_run.folder).items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    assert command("mim_pretrain", *small) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "finished run" in line
    assert command("mim_pretrain", *small, "--c") == 0
    assert "finished already" in capsys.readouterr().out
