"""A wrong command line is answered in one line, by every command and subcommand."""

import pytest

from nnunet_mim.system.cli import OneLineParser


def parser():
    parser = OneLineParser("cook", description="Cooks.")
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("-device", choices=["oven", "pan"])
    command = parser.add_subparsers(metavar="DISH", required=True).add_parser("soup", description="With salt.")
    command.add_argument("--labels")
    return parser


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--iterations 3 soup --lables 4", "cook does not take --lables: did you mean --labels?"),
        ("--iterations 3", "the following arguments are required: DISH (cook --help says more)"),
        ("--iterations 3 soup --salt", "cook does not take --salt: cook --help lists what it takes"),
        ("--iterations x soup", "argument --iterations: invalid int value: 'x' (cook --help says more)"),
        ("soup", "the following arguments are required: --iterations (cook --help says more)"),
        ("--iterations 3 soup --labels", "argument --labels: expected one argument (cook soup --help says more)"),
    ],
)
def test_one_line(capsys, line, message):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(line.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_every_line_of_a_value_is_one_line(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--iterations", "3", "-device", "a\nb", "soup"])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_good_lines_are_read():
    options = parser().parse_args(["--iterations", "3", "soup", "--labels", "all"])
    assert (options.iterations, options.labels) == (3, "all")
