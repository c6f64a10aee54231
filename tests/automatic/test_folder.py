import pytest

from sam_jax.automatic.folder import find_images


def test_two_images_of_one_name(photos):
    (photos / "wide.jpg").write_bytes((photos / "wide.png").read_bytes())
    with pytest.raises(ValueError, match=r"would both be written as 'wide'"):
        find_images([photos])
    # The same file, given twice, counts once.
    assert find_images([photos / "tall.png"] * 2) == [photos / "tall.png"]


def test_a_folder_with_only_folders(tmp_path):
    (tmp_path / "inner").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*; skipped subfolders, which"):
        find_images([tmp_path])
