import os

import pytest

from sam_jax import runs
from sam_jax.files import write_json
from sam_jax.runs import FolderInUseError, check_or_write_settings, lock_folder

WORKS = """
from sam_jax import runs
with runs.lock_folder(path):
    print(flush=True)
    input()
"""


def test_one_run_works_in_a_folder(tmp_path, other_process):
    folder = tmp_path / "new"
    run = other_process(WORKS, folder)
    message = rf"another run is working in .*new \(process {run.pid} on .+, since \d{{4}}-.*:\d\d\)"
    with pytest.raises(FolderInUseError, match=message), lock_folder(folder):
        pass
    # A killed process loses its lock, although it cannot clean up.
    run.kill()
    run.wait()
    assert len(os.listdir(folder)) == 1
    with lock_folder(folder):
        with (
            pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"),
            lock_folder(folder),
        ):
            pass
        assert len(os.listdir(folder)) == 1
    assert os.listdir(folder) == []


def test_systems_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with lock_folder(tmp_path):
        write_json(tmp_path / "file", {})
    assert os.listdir(tmp_path) == ["file"]


def test_settings_must_match_the_results(tmp_path):
    file = tmp_path / "settings.json"
    check_or_write_settings(file, {"size": 1, "sides": (2, 3)}, has_results=False)
    check_or_write_settings(file, {"size": 1, "sides": [2, 3]}, has_results=True)
    message = "already contains results made with different settings: size was 1, now 2"
    with pytest.raises(ValueError, match=message):
        check_or_write_settings(file, {"size": 2, "sides": [2, 3]}, has_results=True)
    check_or_write_settings(str(file), {"size": 2}, has_results=False)  # nothing to compare with
    check_or_write_settings(file, {"size": 2}, has_results=True)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json cannot be read: .+ is not JSON"):
        check_or_write_settings(file, {"size": 2}, has_results=True)
