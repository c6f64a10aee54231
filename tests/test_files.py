import json
import os
from pathlib import Path

import pytest

from sam_jax import files
from sam_jax.files import atomic_write, read_json, require_folder, temporary_folder, write_json


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
            assert path.exists() == (text == "two")
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


def test_a_folder(tmp_path):
    with atomic_write(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("whole")
    assert (tmp_path / "folder" / "file").read_text() == "whole"
    write = atomic_write(tmp_path / "folder")
    temporary = write.__enter__()
    temporary.mkdir()
    (temporary / "file").write_text("other")
    with pytest.raises(OSError, match="not empty"):
        write.__exit__(None, None, None)
    assert (tmp_path / "folder" / "file").read_text() == "whole"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_unfinished_writes_leave_nothing(tmp_path, is_folder):
    def write():
        with atomic_write(tmp_path / "path") as temporary:
            if is_folder:
                temporary.mkdir()
                temporary /= "file"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []


WRITES = """
from pathlib import Path
from sam_jax.files import atomic_write
with atomic_write(Path(path)) as temporary:
    temporary.write_text("half")
    print(flush=True)
    input()
"""


def test_a_folder_that_can_be_created(tmp_path, monkeypatch):
    require_folder("--output", tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ValueError, match=r"--output is .*file, a file; expected a folder"):
            require_folder("--output", path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="cannot be written to"):
        require_folder("--output", tmp_path / "new")


def test_leftovers_of_killed_processes_are_removed(tmp_path, other_process):
    killed = other_process(WRITES, tmp_path / "killed")
    alive = other_process(WRITES, tmp_path / "alive")
    (tmp_path / ".sam_jax-notes").write_text("a file, and so none of a process")
    assert len(os.listdir(tmp_path)) == 3
    killed.kill()
    killed.wait()
    write_json(tmp_path / "new", [1])
    assert len(os.listdir(tmp_path)) == 3
    assert {"new", ".sam_jax-notes"} < {*os.listdir(tmp_path)}
    alive.communicate("\n")
    assert sorted(os.listdir(tmp_path)) == [".sam_jax-notes", "alive", "new"]
    assert (tmp_path / "alive").read_text() == "half"


def test_temporary_folders_are_separate(tmp_path):
    with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second])
        (second / "file").touch()
    assert os.listdir(tmp_path) == []


def test_leftovers_in_relative_folders(tmp_path, monkeypatch):
    for place in ("first", "second"):
        (tmp_path / place / "out" / ".sam_jax-killed").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        files.remove_leftovers(Path("out"))
        assert os.listdir("out") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 101 + b"]" * 101, "is nested 101 levels deep, expected at most 100"),
        (b'{"a":' * 200_000, "is nested 200000 levels deep"),
        (b"[1, 2", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"9" * 5000, "is not JSON"),
        (b"[" + b"1," * 1000 + b"1]", "has 2003 bytes, expected at most 2000"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_json_that_is_refused(tmp_path, content, message):
    (tmp_path / "file.json").write_bytes(content)
    limit = 2000 if "2000" in message and "deep" not in message else 2**30
    for source in (tmp_path / "file.json", content):
        with pytest.raises(ValueError, match=message):
            read_json(source, max_bytes=limit)


def test_json_that_is_accepted(tmp_path):
    # Brackets in strings do not count as nesting, also after escaped quotes and backslashes.
    value = {"a" + "[" * 500: ['"' + "{" * 500, "\\", 1.5, None], "b": [[[]]]}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert read_json(json.dumps(value).encode()) == value
    deepest = b"[" * 100 + b"]" * 100
    assert json.dumps(read_json(deepest)).encode() == deepest


def test_json_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing")


@pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
def test_json_that_cannot_be_written(tmp_path, value):
    write_json(tmp_path / "file.json", [1], indent=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", value)
    assert (tmp_path / "file.json").read_text() == "[\n 1\n]\n"
    assert os.listdir(tmp_path) == ["file.json"]
