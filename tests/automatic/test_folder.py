import pytest

from sam_jax.automatic.folder import find_pictures


def test_two_pictures_of_one_name(photos):
    (photos / "wide.jpg").write_bytes((photos / "wide.png").read_bytes())
    with pytest.raises(ValueError, match=r"would both be written as 'wide'"):
        find_pictures([photos])
    # The same file twice is one.
    assert find_pictures([photos / "tall.png"] * 2) == [photos / "tall.png"]


def test_a_folder_with_folders_alone(tmp_path):
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*; subfolders are passed over, giv"):
        find_pictures([tmp_path])
