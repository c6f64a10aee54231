import os
import subprocess
import sys

import pytest

# Runs in its own process, since the setting affects the whole process.
SCRIPT = """
import resource, sys
from sam_jax.commands.heap import keep_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 80_000_000  # 19,531 pages of 4 KiB, or 39 huge ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_heap()
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_call():
    def faults(mode):
        command = [sys.executable, "-c", SCRIPT, mode]
        environment = {**os.environ, "GLIBC_TUNABLES": ""}
        return int(subprocess.check_output(command, text=True, env=environment))

    assert 10 * faults("keep") < faults("give back")
