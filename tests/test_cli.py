"""The frame of all commands: tables, numbers that are checked as they are parsed, options that go together.

pytest tests/test_cli.py            (the commands themselves, as a user types them: test_commands.py)
"""

import argparse
import importlib
import json

import pytest

from yojo.cli import Parser, run, table, whole, with_interval
from yojo.files import InputError

COMMANDS = "bench checkpoint claims evaluate flops grpo hacking pretrain score train votes".split()


def test_a_table_written_out():
    """Columns are as wide as their widest cell; text to the left, numbers to the right; what is not there is a dash."""
    rows = [{"way": "one pass", "times_joint": 1.0, "n": 4}, {"way": "N passes, each alone", "n": 16}, {"n": None}]
    assert table(rows, {"way": "<", "times_joint": ".2f", "n": "d"}).splitlines() == [
        "way                   times joint   n",
        "one pass                     1.00   4",
        "N passes, each alone            -  16",
        "-                               -   -",
    ]


def test_a_column_may_say_itself_how_it_is_written():
    assert table([{"bytes": 2_500_000_000}], {"bytes": lambda number: f"{number / 1e9:.1f} GB"}) == " bytes\n2.5 GB"
    assert table([], {"a": "<", "b": "d"}) == "a  b"
    assert with_interval(0.5, (0.25, 0.75)) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize("text", ["-1", "1.5", "two", "", "0", str(2**32), "1" + 30 * "0", 9000 * "9", "\u00b2"])
def test_a_whole_number_has_a_least_value(text):
    assert whole(1)("1") == 1 and whole(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="is no whole number from 1"):
        whole(1)(text)


RULES = [
    ("with", "tiny", "seeds"),
    ("without", "tiny", "model dry-run"),
    ("with", "out model", "overwrite"),
    ("or", "tiny", "model out"),
]


def parser(**more):
    made = Parser(prog="made", rules=RULES, **more)
    for name, what in (("tiny", "small"), ("dry-run", "nothing is written"), ("overwrite", "replace it")):
        made.add_argument(f"--{name}", action="store_true", help=what)
    made.add_argument("--seeds", type=whole(1), default=1, help="how many")
    for name in ("model", "out"):
        made.add_argument(f"--{name}", help="a folder")
    return made


@pytest.mark.parametrize(
    "words, why",
    [
        ("--tiny", None),
        ("--tiny --seeds 3 --out x --overwrite", None),
        ("--model m --out x --dry-run", None),
        ("--model m --out x --seeds 1", None),  # its default: nothing is lost
        ("--model m --out x --seeds 2", "--seeds needs --tiny"),
        ("--tiny --dry-run", "--dry-run and --tiny exclude each other"),
        ("--tiny --overwrite", "--overwrite needs --out or --model"),
        ("", "give --tiny, or --model and --out"),
        ("--model m", "give --tiny, or --model and --out"),
    ],
)
def test_options_that_would_do_nothing_or_are_missing_are_named(words, why):
    made = parser()
    args = made.parse_args(words.split())
    if why is None:
        return made.check(args)
    with pytest.raises(InputError) as error:
        made.check(args)
    assert str(error.value) == why


def test_the_help_says_which_options_go_together_and_names_defaults_once():
    said = " ".join(parser().format_help().split())
    assert "--seeds SEEDS (with --tiny) how many" in said and "--overwrite (with --out or --model) replace it" in said
    assert "give --tiny, or --model and --out" in said and said.count("(without --tiny) ") == 2
    assert "None" not in said and "False" not in said and said.count("(default: 0)") == 1


def parsers(name):
    """That of a command, and of its subcommands."""
    module, seen = importlib.import_module(f"yojo.{name}"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", lambda parser, _: seen.append(parser))
        module.main()
    return seen + [*seen[0].commands.choices.values()] if hasattr(seen[0], "commands") else seen


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"checkpoint", "flops", "votes"}))
def test_every_command_that_runs_the_network_can_be_told_where(name, capsys):
    parser = parsers(name)[-1]
    assert "--device" in parser.format_help()
    for wrong in ("gpu", "cuda:", "cuda:x", "mps", ""):
        with pytest.raises(SystemExit):
            parser.parse_args(["--device", wrong])
        assert "is none of cpu, cuda, cuda:0" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_rules_are_about_options_that_exist(name):
    """And every option that a rule names is one that the command takes."""
    for parser in parsers(name):
        options = {word for action in parser._actions for word in action.option_strings}
        for _, first, names in parser.rules:
            assert {f"--{option}" for option in (first + " " + names).split()} <= options


@pytest.mark.parametrize(
    "error, status, printed",
    [
        (InputError("no\nfile x"), 2, "made: no file x\n"),
        (FloatingPointError("step 3: loss nan"), 1, "made: step 3: loss nan\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_are_one_line_and_a_status(monkeypatch, capsys, error, status, printed):
    def command(args):
        raise error

    monkeypatch.setattr("sys.argv", ["made", "--tiny"])
    with pytest.raises(SystemExit) as stop:
        run(parser(), command)
    assert stop.value.code == status and capsys.readouterr().err == printed


def test_what_a_command_finds_is_written_whole(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["made", "--tiny", "--json", str(tmp_path / "r.json"), "--seed", "7"])
    run(parser(), lambda args: {"seed": args.seed})
    assert json.loads((tmp_path / "r.json").read_text()) == {"seed": 7}
