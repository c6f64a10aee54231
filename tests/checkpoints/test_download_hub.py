"""Downloads of files and repositories from the hub, which is simulated or unreachable."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from network import needs_package_index
from toy_model import (
    CONTENT,
    cache_fixture,  # noqa: F401
    toy_fixture,  # noqa: F401
)

from sam_jax.checkpoints import download
from sam_jax.checkpoints.download import MODELS, cached_path, resolve
from sam_jax.errors import CheckpointError


@pytest.fixture
def hub_only(toy, monkeypatch):
    """The toy model, which the package index does not have."""
    monkeypatch.setitem(MODELS, "toy", dataclasses.replace(toy, package=None))


@pytest.mark.usefixtures("hub_only")
def test_offline_mode_does_not_ask_the_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("get_hf_file_metadata", "HfApi"):
        monkeypatch.setattr(huggingface_hub, name, lambda *_, **__: pytest.fail("asked"))
    for name in ("toy", "owner/toy"):
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
            resolve(name)


@pytest.fixture
def closed_hub(monkeypatch):
    """Replaces the hub by a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/toy.pt"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repository, path: url)


@pytest.mark.usefixtures("closed_hub", "hub_only")
def test_an_unreachable_hub_is_given_up_at_once():
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="refused"):
        resolve("toy")
    assert time.monotonic() - start < 4


@pytest.mark.usefixtures("closed_hub", "hub_only")
def test_a_silent_hub_is_given_up_at_the_deadline(monkeypatch):
    monkeypatch.setattr(download, "_HUB_DEADLINE", 0.05)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: time.sleep(1))
    with pytest.raises(ConnectionError, match=r"did not answer within 0\.05 seconds"):
        resolve("toy")


HUB_SERVER = r"""
import http.server, json, os, sys, threading

FILES = {"config.json": b"{}", "model.safetensors": b"the weights", "README.md": b"about",
         "weights/toy.pt": b"the weights"}

class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, status, content = self.path.split("?")[0], 200, b""
        info = {"id": "owner/toy", "sha": "0" * 40, "siblings": [{"rfilename": n} for n in FILES]}
        if path.startswith("/api/models/owner/toy/tree/"):
            content = json.dumps([{"type": "file", "path": name, "size": len(data), "oid": name}
                                  for name, data in FILES.items()]).encode()
        elif path.startswith("/api/models/owner/toy"):
            content = json.dumps(info).encode()
        elif path.startswith("/owner/toy/resolve/"):
            content = FILES[path.split("/", 5)[5]]
        else:
            status = 404
        if self.command == "GET" and (wanted := self.headers["Range"]):
            print(wanted)
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            self.send_response(status)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(status)
        self.send_header("ETag", '"%s"' % path.split("/")[-1])
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:%d" % server.server_port

from pathlib import Path
from sam_jax.checkpoints import download

toy = download.Source("toy.pt", sys.argv[1], 11, "owner/toy", "weights/toy.pt")
download.MODELS["toy"] = toy
file = download.cached_path(toy)
for partial in (b"", b"the w", b"the weights", b"more than the weights", b"other"):
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name("toy.pt.incomplete").write_bytes(partial)
    try:
        print(download.resolve("toy").read_bytes())
    except ConnectionError:
        print(sorted(f.name for f in file.parent.iterdir()))
folder = download.resolve("owner/toy")
print(sorted(path.name for path in folder.iterdir()))
try:
    download.resolve("owner/other")
except FileNotFoundError as error:
    print(error)
server.shutdown()
server.server_close()
print(download.resolve("owner/toy") == folder)
"""


@pytest.mark.slow
def test_the_real_hub_client_against_a_small_hub(tmp_path):
    """Runs in a separate process, since huggingface_hub reads its environment on import."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    run = subprocess.run(
        [sys.executable, "-c", HUB_SERVER, sha256], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    *weights, files, missing, again = run.stdout.splitlines()
    whole = str(CONTENT)
    # The partial file is empty, half, complete, too long, and half of another file.
    left = "['.checked', '.lock']"  # .checked belongs to the earlier file
    assert weights == [whole, "bytes=5-", whole, whole, whole, "bytes=5-", left]
    assert files == "['config.json', 'model.safetensors']"
    assert missing.startswith("owner/other is not a local file or folder, and not a hub repository")
    assert again == "True"


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """Replaces a hub repository: sets its files, and records what was downloaded."""
    hub = SimpleNamespace(files=[], error=None, downloaded=None, local=[], folder=tmp_path)

    def model_info(self, name, timeout):
        if hub.error:
            raise hub.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in hub.files])

    def snapshot_download(name, *, allow_patterns):
        hub.downloaded = allow_patterns
        return str(hub.folder)

    def try_to_load_from_cache(name, file_name):
        for file in hub.local:
            (hub.folder / file).touch()
        return str(hub.folder / file_name) if file_name in hub.local else None

    def hf_hub_download(name, index):
        file = hub.folder / index
        file.write_text(json.dumps({"weight_map": dict(enumerate(hub.shards))}))
        return str(file)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", try_to_load_from_cache)
    return hub


CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]


def test_downloads_config_and_safetensors(repository):
    wanted = [*CONFIGS, "model.safetensors"]
    others = ["README.md", "pytorch_model.bin", "onnx/model.safetensors"]
    repository.files = [*wanted, *others, "model.fp16.safetensors", "other.safetensors"]
    assert resolve("owner/toy") == repository.folder
    assert sorted(repository.downloaded) == sorted(wanted)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_downloads_the_shards_of_the_index(repository, name):
    suffix = Path(name).suffix
    repository.shards = [f"part-1{suffix}", f"part-2{suffix}", f"part-1{suffix}", "../*"]
    wanted = ["config.json", f"{name}.index.json", f"part-1{suffix}", f"part-2{suffix}"]
    repository.files = [*wanted, f"part-3{suffix}", "tf_model.h5"]
    assert resolve("owner/toy") == repository.folder
    assert sorted(repository.downloaded) == sorted(wanted)


def test_downloads_torch_files_if_there_is_nothing_else(repository):
    repository.files = ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    resolve("owner/toy")
    assert repository.downloaded == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize("function", ["snapshot_download", "hf_hub_download"])
def test_a_repository_download_that_stalls(repository, monkeypatch, function):
    repository.files = ["config.json", "model.safetensors.index.json"]
    repository.shards = []

    def stalls(*_, **__):
        raise type("ReadTimeout", (Exception,), {})("The read operation\n timed out")

    monkeypatch.setattr(huggingface_hub, function, stalls)
    message = (
        r"^the download of owner/toy from the hub failed \(ReadTimeout: The read operation "
        r"timed out\)\. Complete files are kept; run it again to resume$"
    )
    with pytest.raises(ConnectionError, match=message):
        resolve("owner/toy")


def test_a_bad_index_of_weights(repository):
    for content in ("[" * 100_000, "[]", '{"weight_map": 3}'):
        repository.folder.joinpath("x").write_text(content)
        with pytest.raises(CheckpointError, match="is not an index of weights"):
            download.read_index(repository.folder / "x")


def test_a_repository_without_weights(repository):
    repository.files = ["config.json", "tf_model.h5"]
    with pytest.raises(
        CheckpointError, match=r"has no model\.safetensors and no .*config\.json, tf_model"
    ):
        resolve("owner/toy")
    assert repository.downloaded is None


def test_a_repository_that_does_not_exist(repository):
    response = SimpleNamespace(headers={}, request=None)
    repository.error = RepositoryNotFoundError("404\n\nNot Found", response=response)
    with pytest.raises(
        FileNotFoundError, match=r"owner/toy is not a local file or folder.*404 Not Found"
    ):
        resolve("owner/toy")


def test_downloaded_repositories_work_without_the_hub(repository):
    repository.error = OSError("no route")
    repository.local = ["config.json", "model.safetensors"]
    assert resolve("owner/toy") == repository.folder


@pytest.mark.parametrize("local", [[], ["config.json"]])
def test_without_the_hub_and_without_weights(repository, local):
    repository.error = OSError("no route")
    repository.local = local
    with pytest.raises(ConnectionError, match=r"hub is unreachable \(no route\)"):
        resolve("owner/toy")


@pytest.mark.slow
@pytest.mark.usefixtures("closed_hub")
def test_mobile_sam_from_the_package_index():
    with needs_package_index():
        path = resolve("mobile_sam")
    assert path == cached_path(MODELS["mobile_sam"])
    assert path.stat().st_size == MODELS["mobile_sam"].size
