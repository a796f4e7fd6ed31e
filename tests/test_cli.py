"""The command line: what it reads, how it fails, and that its help costs nothing."""

import dataclasses
import subprocess
import sys
import types

import pytest

from larimar_jax import cli

COMMANDS = ("demo", "edit", "ask", "forget", "list", "train", "bench", "bench counterfact")


@dataclasses.dataclass
class Fact:
    id: int
    prompt: str
    answer: str


class FakeSession:
    """A session that keeps its facts in a text file."""

    def __init__(self, model):
        self.facts = []

    @classmethod
    def load(cls, folder):
        session = cls("smol")
        lines = (folder / "facts").read_text().splitlines()
        session.facts = [Fact(int(n), *rest) for n, *rest in (line.split("|") for line in lines)]
        return session

    def save(self, folder):
        folder.mkdir(exist_ok=True)
        lines = [f"{fact.id}|{fact.prompt}|{fact.answer}" for fact in self.facts]
        (folder / "facts").write_text("\n".join(lines))

    def write(self, prompt, answer):
        if not answer.strip():
            raise ValueError("the answer is empty")
        self.facts.append(Fact(len(self.facts) + 1, prompt, answer))
        return self.facts[-1]

    def list(self):
        return self.facts


@pytest.fixture
def session(monkeypatch):
    module = types.SimpleNamespace(Session=FakeSession)
    monkeypatch.setitem(sys.modules, "larimar_jax.session", module)


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


def test_edit_starts_a_session_and_list_shows_it(session, tmp_path, capsys):
    folder = str(tmp_path / "s")
    assert cli.main(["edit", "The capital of France is", "Rome", "--session", folder]) == 0
    assert cli.main(["edit", "The sky is", "green", "--session", folder]) == 0
    capsys.readouterr()
    assert cli.main(["list", "--session", folder]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1: The capital of France is Rome",
        "2: The sky is green",
    ]


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

    monkeypatch.setattr(cli, "train", stopped)
    assert cli.main(["train", "--config", "a", "--run", "b"]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_a_config_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli._config("tests/conftest.py").exists()
    assert cli._config("configs/none.py") == cli.Path("configs/none.py")
