"""The messages of `sam-jax demo` when it cannot serve; tests/demo tests what it serves."""

import socket
import sys

import pytest

from sam_jax import cli


@pytest.fixture
def fails(monkeypatch):
    """Runs `sam-jax demo ARGUMENTS`, which must fail; returns the message."""

    def fails(*arguments):
        monkeypatch.setattr(sys, "argv", ["sam-jax", "demo", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return exit_info.value.code

    return fails


@pytest.mark.parametrize(
    ("host", "warns"),
    [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)],
)
def test_public_hosts_cause_a_warning(fails, capsys, host, warns):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert "/no/such/model" in fails("--host", host, "--port", port, "--model", "/no/such/model")
    printed = capsys.readouterr().err
    assert bool(printed) == warns
    assert (
        not warns or f"warning: everyone who can reach port {port} of this machine can" in printed
    )


def test_bad_arguments(fails):
    """Errors come before the model is loaded."""
    message = fails("--max-megabytes", "0", "--model", "/no/such/model")
    assert message == "sam-jax: --max-megabytes is 0, expected 1 or more"
    assert fails("--port", "0") == "sam-jax: --port is 0, expected 1 to 65535"
    for host in ("", "::1"):
        message = fails("--host", host)
        assert message == f"sam-jax: --host is {host!r}, expected a name or an IPv4 address"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        other = f"--port {int(port) + 1}" if port != "65535" else "--port 65534"
        message = fails("--port", port, "--model", "/no/such/model")
        assert message == f"sam-jax: port {port} is already in use: try {other}"


def test_without_the_extra(fails, monkeypatch):
    monkeypatch.delitem(sys.modules, "sam_jax.demo.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert fails() == 'sam-jax: uvicorn is not installed; run: pip install "sam_jax[demo]"'
