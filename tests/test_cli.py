import sys

import pytest

from sam_jax import cli


@pytest.mark.parametrize("arguments", [[], ["segment"], ["segment", "a.png", "--points", "1,2"]])
def test_usage(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sam-jax", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "sam-jax" in printed.err


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sam-jax", "segment", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for part in ("--point X,Y[,LABEL]", "--box X0,Y0,X1,Y1", "--model", "--output", "mobile_sam"):
        assert part in text


def test_a_missing_file_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sam-jax", "segment", "nope.jpg", "--point", "1,2"])
    with pytest.raises(SystemExit, match=r"^sam-jax: nope\.jpg: No such file or directory$"):
        cli.main()


def test_home_in_quotes(monkeypatch, tmp_path):
    """`~` is replaced in all paths, also in those of a list."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sam-jax", "segment", "~/nope.jpg", "--point", "1,2"])
    with pytest.raises(SystemExit, match=rf"^sam-jax: {tmp_path}/nope\.jpg: No such file"):
        cli.main()
    arguments = ["generate", "~/a", "~/b", "--output", "~/c"]
    monkeypatch.setattr(sys, "argv", ["sam-jax", *arguments])
    with pytest.raises(SystemExit, match=rf"^sam-jax: {tmp_path}/a does not exist"):
        cli.main()


STOPPED = """
import sys, time
from pathlib import Path
from sam_jax import cli
from sam_jax.files import temporary_folder

def work(_):
    with temporary_folder(Path(path)):
        print("begun", flush=True)
        time.sleep(60)

sys.argv = ["sam-jax", "segment", "a.png"]
cli._FUNCTIONS = {command: work for command in cli._FUNCTIONS}
cli.main()
"""


def test_a_stopped_command_tidies_up(other_process, tmp_path):
    """SIGTERM, which `timeout` and schedulers send, ends it as an exception does."""
    process = other_process(STOPPED, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    process.terminate()
    assert process.wait(60) == 143
    assert list(tmp_path.iterdir()) == []


def test_help_of_an_option_is_one_paragraph(monkeypatch, capsys):
    """Help is wrapped at the terminal's width, not where the docstring has line breaks."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["sam-jax", "generate", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "Stability is the IoU of the mask at a higher and at a lower threshold" in text
    assert "a new one. All machines must see the same folders." in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command, monkeypatch, capsys):
    """Help fits 80 columns, and optional arguments do not show None."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["sam-jax", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 80
