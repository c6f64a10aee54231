import signal
import subprocess
import sys

import pytest

# Runs in another process: signal handlers are global, and pytest's must not change.
SCRIPT = """
import os, signal
from sam_jax.training import Interrupts

before = signal.getsignal(signal.SIGTERM)
with Interrupts() as interrupts:
    print(interrupts.received)
    os.kill(os.getpid(), signal.SIGTERM)
    print(int(interrupts.received), flush=True)
    if {again}:
        os.kill(os.getpid(), signal.SIGTERM)
assert signal.getsignal(signal.SIGTERM) == before
print("restored")
"""


@pytest.mark.parametrize("again", [False, True])
def test_first_signal_is_noted_and_second_one_kills(again):
    script = [sys.executable, "-c", SCRIPT.format(again=again)]
    ended = subprocess.run(script, capture_output=True, text=True)
    number = int(signal.SIGTERM)
    assert ended.returncode == (-number if again else 0), ended.stderr
    assert ended.stdout.split() == ["None", str(number)] + ([] if again else ["restored"])
    assert "stopping after this step; press again to stop immediately" in ended.stderr
