"""The command line: what it reads, how it fails, and that its help costs nothing."""

import subprocess
import sys

import pytest

from larimar_jax import cli, runs

COMMANDS = (
    "demo", "edit", "ask", "forget", "list", "train", "bench", "bench counterfact", "bench memory",
    "convert", "convert ibm", "export", "export hf",
)


@pytest.fixture
def session(monkeypatch, tiny):
    """Sessions of every name are of the tiny model."""
    from larimar_jax import session

    monkeypatch.setattr(session, "load", lambda source: tiny)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "larimar" in shown and "--debug" in shown


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


def test_no_command_and_an_unknown_benchmark_name_what_there_is(capsys):
    for line, named in (([], "COMMAND"), (["bench", "x"], "counterfact"), (["bench"], "NAME")):
        with pytest.raises(SystemExit) as caught:
            cli.main(line)
        assert caught.value.code == 2
        assert named in capsys.readouterr().err


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
    assert [line.split()[1] for line in run("list", "--history").out.splitlines()] == [
        "write",
        "write",
        "forget",
    ]
    assert cli.main(["forget", "2", "--session", path]) == 2
    assert "forgotten before" in capsys.readouterr().err
    assert cli.main(["edit", "Fact 3 is", " ", "--session", path]) == 2
    assert "needs a prompt and an answer" in capsys.readouterr().err
    assert run("list").out == "1: Fact 1 is new\n"


def test_a_missing_session_says_how_to_start_one(tmp_path, capsys):
    for line in (["ask", "x"], ["forget", "1"], ["list"]):
        assert cli.main([*line, "--session", str(tmp_path / "none")]) == 2
        shown = capsys.readouterr().err
        assert "there is no session at" in shown and "larimar edit" in shown
        assert "Traceback" not in shown


def test_errors_of_libraries_and_debug_keep_their_traceback(monkeypatch, tmp_path):
    def slip(arguments):
        int("not a number, in a library's words")

    monkeypatch.setattr(cli, "show", slip)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["list"])
    monkeypatch.undo()
    for line in (["--debug", "list"], ["list", "--debug"]):
        with pytest.raises(FileNotFoundError):
            cli.main([*line, "--session", str(tmp_path / "none")])


def test_a_benchmarks_missing_data_is_one_message(tmp_path, capsys):
    line = ["bench", "counterfact", "--data", str(tmp_path / "no.json"), "--out", str(tmp_path)]
    assert cli.main(line) == 2
    assert "no.json" in capsys.readouterr().err


def test_stopping_by_hand_says_how_to_go_on(monkeypatch, capsys):
    def stopped(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", stopped)
    assert cli.main(["train", "--config", "a", "--run", "b"]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err
