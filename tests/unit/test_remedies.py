"""Every command that a message or a document tells a user to type is one that its parser takes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))


def test_what_is_found_in_a_sentence(reference):
    text = "no plans: run `mim_plan -d ⟨x⟩ -o NAME`, or nnUNetv2_train 501 3d_fullres 0 first"
    found = list(reference.messages.commands_in(text))
    assert found == [("mim_plan", ["-d", "⟨x⟩", "-o", "NAME"]), ("nnUNetv2_train", ["501", "3d_fullres", "0"])]


def test_what_is_wrong_is_found(reference, parser_of):
    problem = reference.messages.problem
    assert problem(parser_of("mim_plan"), ["-pc", "X"]) == "lacks -d"
    assert problem(parser_of("mim_plan"), ["-d", "5", "--nope"]) == "does not take --nope"
    assert problem(parser_of("nnUNetv2_train"), ["501", "-p", "NAME"]) == "lacks configuration"
    assert problem(parser_of("mim_benchmark"), ["runn"]) == "no subcommand runn"
    assert problem(parser_of("mim_plan"), ["-d", "5", "-pc", "X"]) is None


@pytest.mark.parametrize("path", ["README.md", *DOCS])
def test_every_command_in_a_code_block_parses(reference, parser_of, path):
    wrong = []
    for block in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", (ROOT / path).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for name, words in reference.messages.commands_in(line.split("#")[0]):
                parser = parser_of(name)
                if parser is not None and (what := reference.messages.problem(parser, words)):
                    wrong.append(f"{line.strip()}: {what}")
    assert not wrong, "\n".join(wrong)
