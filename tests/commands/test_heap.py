import os
import subprocess
import sys

import pytest

# In a process of its own, since the setting is for all of it.
SCRIPT = """
import resource, sys
from sam_jax.commands.heap import keep_heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 80_000_000  # 19,531 pages of 4 KiB, or 39 huge ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_heap() if sys.argv[1:] else None
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize("keeps", [False, True])
def test_freed_memory_is_kept_for_the_next_call(keeps):
    command = [sys.executable, "-c", SCRIPT, *["keep"] * keeps]
    environment = {**os.environ, "GLIBC_TUNABLES": ""}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    faults = int(ended.stdout)
    assert faults < 30 if keeps else faults > 30
