"""Every command that a message or a document tells a user to type is one that its parser takes."""

import argparse
import ast
import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
SCRIPTS = dict(re.findall(r'^(mim_\w+) = "([\w.:]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
COMMAND = re.compile(r"\b(mim_[a-z]+|nnUNetv2_\w+)(?![\w/.-])")
VALUE = re.compile(r"⟨|[A-Z0-9…'\"]|.*[_=/.\d]")
"""beginning of what can only be a value: a placeholder, capitals, a number; or a word with signs in it"""


EXITING = {"-h", "--help", "--list_settings", "--list_weights"}


class ParserFoundError(Exception):
    """Carries the parser of a command out of it."""


@pytest.fixture(scope="module")
def parser_of():
    """parser_of(name): the argparse parser of one of our commands or nnU-Net's; None for a name that is no command."""
    theirs = importlib.metadata.distribution("nnunetv2").entry_points
    entries = {**{e.name: e.value for e in theirs}, **SCRIPTS}
    found = {}

    def capture(self, *_, **__):
        raise ParserFoundError(self)

    def find(name):
        if name not in found and name in entries:
            module, function = entries[name].split(":")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
                with pytest.raises(ParserFoundError) as error:
                    getattr(importlib.import_module(module), function)()
            found[name] = error.value.args[0]
        return found.get(name)

    return find


def words_after(text):
    """The words of a command line in a sentence: flags, and values as far as they can be told from prose."""
    words: list[str] = []
    for word in text.split():
        bare = word.strip("`'\"()[],;:").rstrip(".")
        ends = word.rstrip("'\"") != word.rstrip("'\"`),;:.") or not bare
        is_flag = re.fullmatch(r"--?[A-Za-z]\w*", bare) is not None
        if not is_flag and not (words and words[-1].startswith("-")) and not VALUE.match(bare):
            break
        words.append(bare)
        if ends:
            break
    return words


def problem(parser, words):
    """What is wrong with a command line, or None. Without any flag or value it is only the name of a command."""
    subcommands = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if subcommands is not None:
        parser = subcommands.choices.get(words[0]) if words else parser
        if parser is None:
            return f"no subcommand {words[0]}"
        words = words[1:]
    if not words:
        return None
    flags = [word for word in words if word.startswith("-") and not word[1:2].isdigit()]
    if unknown := [flag for flag in flags if flag not in parser._option_string_actions]:
        return f"does not take {unknown[0]}"
    if EXITING.intersection(flags):
        return None
    given = {parser._option_string_actions[flag].dest for flag in flags}
    optional = [a for a in parser._actions if a.option_strings]
    if missing := [a.option_strings[0] for a in optional if a.required and a.dest not in given]:
        return f"lacks {missing[0]}"
    positional = [a for a in parser._actions if not a.option_strings and a.nargs not in ("*", "?")]
    values = []
    for before, word in zip(["", *words], words, strict=False):
        action = parser._option_string_actions.get(before)
        if not word.startswith("-") and (action is None or action.nargs == 0):
            values.append(word)
    return f"lacks {positional[len(values)].dest}" if len(values) < len(positional) else None


def text_of(node):
    """The text of a string, with ⟨…⟩ for what an f-string fills in; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "⟨x⟩" for part in node.values)
    return None


def messages(tree):
    """(line, text) of every string that is not a docstring."""
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    inside = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in ast.walk(tree):
        if id(node) not in docstrings | inside and (text := text_of(node)):
            yield node.lineno, text


def commands_in(text):
    """(name, words after it) of every command in a text."""
    for match in COMMAND.finditer(text):
        rest = text[match.end() :].split("\n")[0]
        yield match.group(1), words_after(rest) if rest[:1] == " " else []


def test_what_is_found_in_a_sentence():
    found = list(commands_in("no plans: run `mim_plan -d ⟨x⟩ -o NAME`, or nnUNetv2_train 501 3d_fullres 0 first"))
    assert found == [("mim_plan", ["-d", "⟨x⟩", "-o", "NAME"]), ("nnUNetv2_train", ["501", "3d_fullres", "0"])]


def test_what_is_wrong_is_found(parser_of):
    assert problem(parser_of("mim_plan"), ["-pc", "X"]) == "lacks -d"
    assert problem(parser_of("mim_plan"), ["-d", "5", "--nope"]) == "does not take --nope"
    assert problem(parser_of("nnUNetv2_train"), ["501", "-p", "NAME"]) == "lacks configuration"
    assert problem(parser_of("mim_benchmark"), ["runn"]) == "no subcommand runn"
    assert problem(parser_of("mim_plan"), ["-d", "5", "-pc", "X"]) is None


def test_every_command_in_a_message_parses(parser_of):
    wrong = []
    for path in sorted((ROOT / "nnunet_mim").rglob("*.py")):
        for line, text in messages(ast.parse(path.read_text())):
            for name, words in commands_in(text):
                parser = parser_of(name)
                if parser is not None and (what := problem(parser, words)):
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {name} {' '.join(words)}: {what}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", ["README.md", *DOCS])
def test_every_command_in_a_code_block_parses(parser_of, path):
    wrong = []
    for block in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", (ROOT / path).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for name, words in commands_in(line.split("#")[0]):
                parser = parser_of(name)
                if parser is not None and (what := problem(parser, words)):
                    wrong.append(f"{line.strip()}: {what}")
    assert not wrong, "\n".join(wrong)
