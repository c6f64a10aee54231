import os
import signal
import sys
import time

import pytest

from sam_jax import cli
from sam_jax.commands.segment import Segment
from sam_jax.files import temporary_folder


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


def test_a_stopped_command_tidies_up(monkeypatch, tmp_path):
    """SIGTERM, which `timeout` and schedulers send, ends it as an exception does."""

    def work(_):
        with temporary_folder(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    monkeypatch.setitem(cli._FUNCTIONS, Segment, work)
    monkeypatch.setattr(sys, "argv", ["sam-jax", "segment", "a.png", "--point", "1,2"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit_info.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_help_of_an_option_is_one_paragraph(monkeypatch, capsys):
    """Wrapped at the width of the terminal, wherever its docstring has lines."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["sam-jax", "generate", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "Stability is the IoU of the mask at a higher and at a lower threshold" in text
    assert "a new one. All machines must see the same folders." in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_that_may_be_left_out_show_no_none(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sam-jax", command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "None" not in capsys.readouterr().out
