"""The command line: what it reads, how it fails, and that its help costs nothing."""

import io
import json
import subprocess
import sys

import pytest
import session_writer

from larimar_jax import cli
from larimar_jax.train import train_commands


@pytest.fixture
def session(monkeypatch, tiny):
    """Sessions of every name are of the tiny model."""
    from larimar_jax import session

    monkeypatch.setattr(session, "load", lambda source: tiny)


@pytest.mark.parametrize("command", ["", *cli.COMMANDS, *cli.GROUPS, "bench counterfact"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "larimar" in shown and "--debug" in shown
    if command in cli.COMMANDS:
        assert "example:\n  larimar " + command in shown and "Args" not in shown
        assert max(map(len, shown.splitlines())) <= 110


def test_help_imports_nothing_heavy():
    script = (
        "import atexit, sys; from larimar_jax import cli;"
        "heavy = ('jax', 'flax', 'numpy', 'rich', 'matplotlib');"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules]));"
        "cli.main([*sys.argv[1:], '--help'])"
    )
    for command in ([], ["train"], ["ask"]):
        line = [sys.executable, "-c", script, *command]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


def test_arguments_and_options_are_a_functions_parameters():
    line = "plan --config a --devices 8 --set x.y=1 z=2 --set w=3 --flops 2e12 --json"
    arguments = vars(cli.parser().parse_args(line.split()))
    numbers = dict(devices=8, memory="80GB", flops=2e12, mfu=0.4, node=8, disk=1e9, json=True)
    numbers |= dict(link=train_commands.A100_LINK, network=train_commands.NETWORK)
    overrides = ["x.y=1", "z=2", "w=3"]
    assert arguments == dict(command="plan", config="a", overrides=overrides, **numbers)
    arguments = cli.parser().parse_args("report a b --out c --no-texts".split())
    assert (arguments.folders, arguments.texts) == (["a", "b"], False)
    assert cli.parser().parse_args(["report", "a", "--out", "c"]).texts is True


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "COMMAND"),
        ("bench", "NAME"),
        ("bench x", "counterfact"),
        ("ask x --tokens 0", "must be at least 1, not 0"),
        ("plan --config a --devices 1 --link inf", "must be above 0, not inf"),
        ("plan --devices 1", "required: --config"),
    ],
)
def test_a_line_that_makes_no_sense_names_what_does(line, words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_session_from_the_first_edit_to_the_last_forget(session, tmp_path, capsys):
    path = str(tmp_path / "s")

    def run(*line):
        assert cli.main([*line, "--session", path]) == 0
        return capsys.readouterr()

    run("edit", "Fact 1 is", "new")
    run("edit", "The capital of France is", "Japan")
    listed = run("list").out.splitlines()
    assert listed == ["1: Fact 1 is new", "2: The capital of France is Japan"]
    assert "from fact 2" in run("ask", "The capital of France is", "--tokens", "3").err
    assert run("forget", "2").out == "forgotten 2: The capital of France is Japan\n"
    assert "nothing written applies" in run("ask", "The capital of France is", "--tokens", "3").err
    run("edit", "Fact 1 is", "true")
    events = [line.split() for line in run("log").out.splitlines()]
    assert [event[0] for event in events] == ["1", "2", "3", "4", "4"]
    assert [event[2] for event in events] == ["write", "write", "forget", "forget", "write"]
    assert run("undo").out.splitlines() == [
        "forgotten 3: Fact 1 is true",
        "written 4: Fact 1 is new",
    ]
    assert run("undo", "--time", "2999-01-01").err == "(nothing differs)\n"
    assert run("undo", "--to", "3").err == "(nothing differs)\n"
    assert cli.main(["undo", "--to", "9", "--session", path]) == 2
    assert "the history has 5 changes" in capsys.readouterr().err
    assert cli.main(["forget", "2", "--session", path]) == 2
    assert "forgotten before" in capsys.readouterr().err
    assert cli.main(["edit", "Fact 3 is", " ", "--session", path]) == 2
    assert "needs a prompt and an answer" in capsys.readouterr().err
    assert run("list").out == "4: Fact 1 is new\n"


def test_facts_of_a_file_are_written_and_lines_of_standard_input_answered(
    session, tmp_path, monkeypatch, capsys
):
    facts, path = tmp_path / "facts.jsonl", str(tmp_path / "s")
    first = {"prompt": "Fact 1 is", "answer": "-40C", "rephrasings": ["Says of fact 1:"]}
    facts.write_text("\n\n".join(map(json.dumps, [first, dict(prompt="Fact 2 is", answer="new")])))
    assert cli.main(["edit", "--file", str(facts), "--session", path]) == 0
    assert capsys.readouterr().out.splitlines() == ["1: Fact 1 is -40C", "2: Fact 2 is new"]
    text = b"Says of fact 1:\n\nFact 2 is\r\nThe capital of France is\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), "ascii"))
    assert cli.main(["ask", "--tokens", "2", "--session", path]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    sources = [line.partition(";")[0] for line in shown.err.splitlines()]
    assert sources == ["(from fact 1", "(from fact 2", "(nothing written applies"]


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "Fact 2 is", "answer": 1234}', "line 2: answer is the int 1234"),
        ('{"prompt": "Fact 2 is"}', "line 2: a fact is"),
        ('{"prompt": "Fact 2 is", "answer": "x", "rephrasings": "y"}', "is a list of texts"),
        ("[1, 2]", "line 2: a fact is"),
        ("Fact 2 is new", "line 2: Expecting value"),
        ("caf\udce9", "line 2: 'utf-8' codec"),
    ],
)
def test_a_file_with_a_line_that_is_no_fact_writes_nothing(tmp_path, line, words, capsys):
    facts, path = tmp_path / "facts.jsonl", tmp_path / "s"
    text = '{"prompt": "Fact 1 is", "answer": "new"}\n' + line
    facts.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert cli.main(["edit", "--file", str(facts), "--session", str(path)]) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.endswith("Nothing is written.\n") and not path.exists()


def test_a_fact_and_its_history_are_purged(session, tmp_path, capsys):
    path = tmp_path / "s"

    def run(*line):
        assert cli.main([*line, "--session", str(path)]) == 0
        return capsys.readouterr().out

    for answer in ("Japan7", "city7"):
        run("edit", "The capital of France is", answer)
    run("edit", "Fact 1 is", "-4")
    run("forget", "2", "--purge")
    assert "The capital" not in path.read_text() and run("log").count("write") == 1
    run("edit", "Fact 1 is", "new")
    run("forget", "--purge")
    assert "-4" not in path.read_text() and run("log").count("write") == 1
    assert run("list") == "4: Fact 1 is new\n"


def test_what_a_shell_gives_that_is_no_text_is_one_message(tmp_path, capsys):
    path = str(tmp_path / "s")
    for line, words in (
        (["edit", "caf\udce9 is", "Ines"], "'caf\\udce9 is' holds bytes that are not UTF-8"),
        (["edit", "only a prompt"], "give a prompt and an answer"),
        (["edit", "a prompt", "--file", "x"], "give a prompt and an answer"),
        (["forget"], "name the fact to forget"),
    ):
        assert cli.main([*line, "--session", path]) == 2
        shown = capsys.readouterr().err
        assert words in shown and shown.count("\n") == 1
    for line in (["edit", "a", "b"], ["list"], ["ask", "x"]):
        assert cli.main([*line, "--session", str(tmp_path)]) == 2
        assert "is a folder, and a session is a file, such as" in capsys.readouterr().err


def test_a_terminal_without_a_character_shows_its_number(tmp_path, monkeypatch):
    session_writer.write(tmp_path / "s", "caf\xe9", 1)
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", screen)
    assert cli.main(["list", "--session", str(tmp_path / "s")]) == 0
    screen.flush()
    assert screen.buffer.getvalue() == b"1: caf\\xe9 0 new\n"


def test_a_missing_session_and_missing_data_are_one_message(tmp_path, capsys):
    for line in (["ask", "x"], ["forget", "1"], ["list"]):
        assert cli.main([*line, "--session", str(tmp_path / "none")]) == 2
        shown = capsys.readouterr().err
        assert "there is no session at" in shown and "larimar edit" in shown
        assert "Traceback" not in shown
    line = ["bench", "counterfact", "--data", str(tmp_path / "no.json"), "--out", str(tmp_path)]
    assert cli.main(line) == 2
    assert "no.json" in capsys.readouterr().err


def test_errors_of_libraries_and_debug_show_a_traceback(monkeypatch, tmp_path):
    def slip():
        """Slip."""
        int("not a number, in a library's words")

    monkeypatch.setitem(cli.COMMANDS, "list", slip)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["list"])
    monkeypatch.undo()
    for line in (["--debug", "list"], ["list", "--debug"]):
        with pytest.raises(FileNotFoundError):
            cli.main([*line, "--session", str(tmp_path / "none")])


def test_stopping_by_hand_tells_how_to_go_on(monkeypatch, capsys):
    def stop():
        """Stop."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", stop)
    assert cli.main(["train"]) == 130
    assert "goes on where it was stopped" in capsys.readouterr().err
