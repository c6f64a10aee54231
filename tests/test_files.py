import os

import pytest

from sam_jax.files import replacing


def test_a_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert path.exists() == (text == "two")
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


def test_a_folder(tmp_path):
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("whole")
    assert (tmp_path / "folder" / "file").read_text() == "whole"
    write = replacing(tmp_path / "folder")
    temporary = write.__enter__()
    temporary.mkdir()
    (temporary / "file").write_text("other")
    with pytest.raises(OSError, match="not empty"):
        write.__exit__(None, None, None)
    assert (tmp_path / "folder" / "file").read_text() == "whole"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_nothing_is_left_of_what_was_not_finished(tmp_path, is_folder):
    def write():
        with replacing(tmp_path / "path") as temporary:
            if is_folder:
                temporary.mkdir()
                temporary /= "file"
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []
