"""Every flag that a message or a help text names is one that its command takes, alone or in a command to be typed."""

import argparse
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINERS = "nnunet_mim.trainers.trainer"
STYLE = "reporting.page"
"""module with CSS, whose properties look like flags"""
PRINTED_BY = {
    "benchmarking.experiment.refuse_unfinished": ["mim_benchmark run"],  # few_shot tries again without being told
    "checkpoint.locate.no_checkpoint_error": ["nnUNetv2_train"],  # mim_benchmark says itself what else to do
    "classification.comparison.kept_cases": ["mim_classify report", "mim_benchmark run"],
    "classification.encoders._find": ["mim_classify train"],  # arms have a checkpoint
    "classification.options.ClassifyConfig": [
        "mim_classify train",
        "mim_benchmark run",
    ],  # others read what was checked
    "classification.predict.TrainedClassifier": ["mim_classify predict", "mim_classify report"],
    "config.PretrainConfig": ["mim_pretrain"],  # others name the file in front, whose settings have these names
    "inspection.show.show": ["mim_inspect"],  # mim_demo gives one file, and a checkpoint that says its spacing
    "nnunet.splits.split_of": ["mim_pretrain"],  # mim_benchmark says what chooses a fold there
    "pretraining.options.RunOptions": ["mim_pretrain"],  # mim_classify gives devices and precision only
}
"""commands that print what these say, where more can reach it, as the source alone tells"""


@pytest.fixture(scope="module")
def package(reference):
    return reference.messages.Package(ROOT, "nnunet_mim")


@pytest.fixture(scope="module")
def messages(package):
    return package.messages()


@pytest.fixture(scope="module")
def commands(parser_of):
    """{command, of several the subcommand: (its parser, (module, function) that runs it)} of those that print."""
    found = {"nnUNetv2_train": (parser_of("nnUNetv2_train"), (TRAINERS, "nnUNetTrainerMiMScratch"))}
    for name, entry in parser_of.scripts.items():
        module, main = entry.split(":")
        parser = parser_of(name)
        subcommands = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})
        for choice, made in subcommands.items():
            found[f"{name} {choice}"] = made, (module, made.get_default("run").__name__)
        if not subcommands:
            found[name] = parser, (module, main)
    return found


def all_flags(parser):
    """The flags of a command and its subcommands."""
    subcommands = next((a.choices.values() for a in parser._actions if isinstance(a, argparse._SubParsersAction)), ())
    return {*parser._option_string_actions, *(flag for made in subcommands for flag in made._option_string_actions)}


@pytest.fixture(scope="module")
def unknown_flags(reference, parser_of):
    """unknown_flags(text, parsers): (flag, commands that do not take it) of the flags in a text.

    `parsers` are those of the commands that print it, by name. A flag is known if one of the commands that the text
    names takes it, or else all that print it.
    """

    def find(text, parsers):
        named = [parser for name in reference.messages.COMMAND.findall(text) if (parser := parser_of(name))]
        for flag in reference.messages.FLAG.findall(text):
            lacking = [name for name, parser in parsers.items() if flag not in all_flags(parser)]
            if (lacking or not parsers) and not any(flag in all_flags(parser) for parser in named):
                yield flag, lacking

    return find


@pytest.fixture(scope="module")
def printed_by(package, commands):
    """printed_by(module, name): the commands that can reach a definition."""
    reached = {command: package.reached_from(place) for command, (_, place) in commands.items()}
    return lambda module, name: [command for command, places in reached.items() if (module, name) in places]


@pytest.fixture(scope="module")
def helps(commands, parser_of):
    """[(command, its parser, text)] of everything that --help shows."""
    parsers = {name: parser for name, (parser, _) in commands.items() if name != "nnUNetv2_train"}
    parsers |= {name: parser_of(name) for name in parser_of.scripts}
    texts = [(name, made, text) for name, made in parsers.items() for text in (made.description, made.epilog) if text]
    return texts + [(name, made, a.help % {"default": a.default}) for name, made in parsers.items()
                    for a in made._actions if a.help and not isinstance(a, argparse._SubParsersAction)]  # fmt: skip


def test_every_flag_in_a_help_is_known(helps, unknown_flags):
    wrong = [
        f"{name}: {flag}: {text}" for name, parser, text in helps for flag, _ in unknown_flags(text, {name: parser})
    ]
    assert not wrong, "\n".join(wrong)


def test_every_flag_in_a_message_is_known(reference, messages, commands, helps, unknown_flags, printed_by):
    wrong, shown = [], "\n".join(text for _, _, text in helps)
    for module, name, line, texts in messages:
        if module.endswith(STYLE) or all(reference.messages.FLAG.fullmatch(text) for text in texts):
            continue  # a word of a list, which is judged as a whole
        definition, reaching = f"{module.removeprefix('nnunet_mim.')}.{name}", printed_by(module, name)
        printing = PRINTED_BY.get(definition, reaching)
        assert {*printing} <= {*reaching}, f"{definition} is not reached from all of {printing}"
        if module.startswith("nnunet_mim.classification."):  # an experiment's file has entries of these names
            printing = [command for command in printing if command != "mim_benchmark run"]
        parsers = {command: commands[command][0] for command in printing}
        for text in texts if printing else [text for text in texts if text not in shown]:
            wrong += [f"{module}:{line}: {flag}, not of {lacking or 'any command'}: {text}"
                      for flag, lacking in unknown_flags(text, parsers)]  # fmt: skip
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def wrong_commands(reference, parser_of, messages):
    for module, _, line, texts in messages:
        for text in texts:
            for name, words in reference.messages.commands_in(text):
                parser = parser_of(name)
                if parser is not None and (what := reference.messages.problem(parser, words)):
                    yield f"{module}:{line}: {name} {' '.join(words)}: {what}"


def test_every_command_that_is_filled_in_parses(reference, parser_of, messages):
    filled_in = [text for _, _, _, texts in messages for text in texts]
    assert any("run mim_prepare -d ⟨x⟩ -s ⟨x⟩ -p ⟨x⟩" in text for text in filled_in), "functions are not filled in"
    assert any(text.startswith("nnUNetv2_predict -d ⟨x⟩ -i ⟨x⟩") for text in filled_in), "lists are not joined"
    wrong = list(dict.fromkeys(wrong_commands(reference, parser_of, messages)))
    assert not wrong, "\n".join(wrong)


MADE_UP = {
    "cli": """
from made_up.remedies import WEIGHTS, command, hint

def main():
    'A docstring may name --anything.'
    number = 501
    print(f"run {command(number)} first")
    print("or take " + hint(True))
    print(["nnUNetv2_predict", *"-d 5 -i A -o B -c C".split(), *(["--nope_listed", "3"] if WEIGHTS else [])])
""",
    "remedies": """
WEIGHTS = "mim_classify predict --target T -i A -o B.csv -d 5 --nope-hyphened"

def command(number):
    spacing = "1 1 1"
    return mim_plan(number, f" -s {spacing}") if number else "mim_prepare -d 501 -s 1 1 1"

def mim_plan(number, options=" --preset small"):
    return f"mim_plan -d {number}{options}"

def hint(is_long):
    text = "--preset tiny, or "
    text += "leave out --nope_bare"
    return text if is_long else "-d"
""",
}


def test_what_is_wrong_is_found(reference, parser_of, unknown_flags, tmp_path):
    (tmp_path / "made_up").mkdir()
    for name, source in MADE_UP.items():
        (tmp_path / "made_up" / f"{name}.py").write_text(source)
    made_up = reference.messages.Package(tmp_path, "made_up")
    messages = made_up.messages()
    wrong = {line.split(": ", 1)[1] for line in wrong_commands(reference, parser_of, messages)}
    assert wrong == {
        "mim_plan -d ⟨x⟩ -s 1 1 1: does not take -s",
        "mim_classify predict --target T -i A -o B.csv -d 5 --nope-hyphened: does not take --nope-hyphened",
        "nnUNetv2_predict -d 5 -i A -o B -c C --nope_listed 3: does not take --nope_listed",
    }
    plan = {"mim_plan": parser_of("mim_plan")}
    reached = made_up.reached_from(("made_up.cli", "main"))
    assert reached == {
        ("made_up.cli", "main"), *(("made_up.remedies", name) for name in ("WEIGHTS", "command", "hint", "mim_plan"))
    }  # fmt: skip
    texts = [text for module, name, _, texts in messages if (module, name) in reached for text in texts]
    assert "or take --preset tiny, or leave out --nope_bare" in texts
    assert {flag for text in texts for flag, _ in unknown_flags(text, plan)} >= {"--nope_bare", "-s"}
    assert list(unknown_flags("leave out --preset", plan)) == []
    assert list(unknown_flags("leave out --preset", {})) == [("--preset", [])]
    assert list(unknown_flags("with --init of mim_pretrain, or --nope", plan)) == [("--nope", ["mim_plan"])]
