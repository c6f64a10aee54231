import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Compiles two programs, then prints the folder, how many programs it already had, and warnings.
SCRIPT = """
import json, sys, warnings
import jax
from sam_jax import enable_compilation_cache
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    folder = enable_compilation_cache(*sys.argv[1:])
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    for number in (2, 3):
        jax.jit(lambda x: x * number)(1.0)
hits = hits.count("/jax/compilation_cache/cache_hits")
print(json.dumps([str(folder), hits, [str(w.message) for w in found]]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script in a process without the tests' own cache."""
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAM_JAX_CACHE", str(tmp_path / "cache"))

    def run(*arguments, **environment):
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(ended.stdout)

    return run


def test_the_second_process_compiles_nothing(run, tmp_path):
    folder = tmp_path / "cache" / "compiled"
    assert run() == [str(folder), 0, []]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert run() == [str(folder), 2, []]
    # A killed process may leave half an entry, without its time, which is written last.
    entries = sorted(folder.glob("*-cache"))
    entries[0].write_bytes(entries[0].read_bytes()[:10])
    entries[0].with_name(entries[0].name.replace("-cache", "-atime")).unlink()
    assert run() == [str(folder), 1, []]
    assert run() == [str(folder), 2, []]


def test_user_settings_are_kept(run, tmp_path):
    assert run(tmp_path / "mine")[0] == str(tmp_path / "mine")
    elsewhere = str(tmp_path / "elsewhere")
    assert run(JAX_COMPILATION_CACHE_DIR=elsewhere)[0] == elsewhere
    assert run(JAX_ENABLE_COMPILATION_CACHE="false") == ["None", 0, []]
    assert not (tmp_path / "cache").exists()


def test_unsafe_and_unusable_folders(run, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    folder, _, (warning,) = run(tmp_path / "shared")
    assert folder == "None"
    assert "because other users can write to it; to allow it, run: chmod go-w" in warning
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == ["None", 0, []]
    assert not list((tmp_path / "shared").iterdir())
