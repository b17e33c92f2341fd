"""Stores of both kinds keep the same promises: a memory is whole or not there, names stay names, damage is told."""

import io
import itertools
import os
import random
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from http_serving import BASE, TEXTS, client_of, decoder_of, finished, offline, service_of, written

from memdlm.errors import ConfigError, MachineError, MemoryFileError
from memdlm.memory import read_memory
from memdlm.serving.http.store import FolderStore
from memdlm.serving.http.url_store import UrlStore, shown, store_at

NUMBERS = itertools.count()
KINDS = ("folder", "file", "memory")
URLS = ("file", "memory")
SECONDS = 1


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_of(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def saved(decoder):
    return {name: written(decoder, TEXTS[name]) for name in TEXTS}


@pytest.fixture
def place(request, tmp_path):
    """Where a store of a kind lies."""
    return {
        "folder": str(tmp_path / "store"),
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://store{next(NUMBERS)}",
    }[request.param]


of_every_kind = pytest.mark.parametrize("place", KINDS, indirect=True)
of_urls = pytest.mark.parametrize("place", URLS, indirect=True)


def is_same(one, two):
    return one.provenance == two.provenance and all(
        (one.pairs[module][side] == value).all() for module, pair in two.pairs.items() for side, value in pair.items()
    )


def put(url, path, data):
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    files.pipe_file(f"{root}/{path}", data)


def listed(url):
    files, root = fsspec.core.url_to_fs(url)
    return sorted(each[len(root) :].lstrip("/") for each in files.find(root))


def upload(folder, url):
    """What `aws s3 sync` does."""
    for path in folder.rglob("*"):
        if path.is_file():
            put(url, str(path.relative_to(folder)), path.read_bytes())


@of_every_kind
def test_what_is_kept_is_read_described_fetched_and_deleted(place, saved, tmp_path):
    store, other = store_at(place), store_at(place)
    assert isinstance(store, FolderStore if "://" not in place else UrlStore)
    assert store.names() == []
    for name in TEXTS:
        store.keep(name, saved[name])
    assert store.names() == other.names() == sorted(TEXTS)
    for name in TEXTS:
        assert is_same(other.read(name), saved[name])
        told = other.describe(name)
        assert (told.problem, told.num_parameters) == (None, saved[name].num_parameters)
        assert other.name_at(other.place_of(name)) == name
        assert other.name_at(f"{other.where}/{other.place_of(name)}") == name
        with other.archive(name) as file, tarfile.open(fileobj=io.BytesIO(file.read())) as tar:
            tar.extractall(tmp_path / "fetched", filter="data")
        assert is_same(read_memory(tmp_path / "fetched" / f"{name}.mem"), saved[name])
    other.delete("alpha")
    assert store.names() == ["beta"]
    for act in (store.read, store.delete, store.describe, store.version_of, store.place_of, store.archive):
        with pytest.raises(MemoryFileError, match="there is no memory 'alpha'"):
            act("alpha")


@of_every_kind
def test_a_version_changes_with_its_memory_alone(place, saved):
    store, other = store_at(place), store_at(place)
    for name in TEXTS:
        store.keep(name, saved[name])
    before = {name: store.version_of(name) for name in TEXTS}
    assert before == {name: other.version_of(name) for name in TEXTS}
    other.keep("alpha", saved["beta"])
    assert store.version_of("alpha") != before["alpha"]
    assert store.version_of("beta") == before["beta"]
    assert is_same(store.read("alpha"), saved["beta"])
    if "://" in place:
        assert len([each for each in listed(place) if each.startswith("alpha")]) == 1, "the earlier one is deleted"


@of_every_kind
@pytest.mark.parametrize("name", ["..", "../a", "a/b", "", ".hidden", "a..b", "-a", "a.mem", "\0", "a\\b", 3])
def test_no_name_becomes_a_path(place, name, saved):
    store = store_at(place)
    store.keep("kept", saved["alpha"])
    with pytest.raises(ConfigError, match="name must have"):
        store.keep(name, saved["alpha"])
    for act in (store.version_of, store.delete, store.read):
        with pytest.raises(MemoryFileError):
            act(str(name))
    for where in ("..", "../kept.mem", "/etc", "nothing", "kept.mem/memory.json", "\0"):
        with pytest.raises(MemoryFileError):
            store.name_at(where)
    assert store.names() == ["kept"]


@of_urls
def test_a_folder_that_was_uploaded_is_read_until_it_is_written_anew(place, saved, tmp_path):
    for name in ("alpha.mem", "beta", "beta.mem"):
        saved[name.removesuffix(".mem")].save(tmp_path / "local" / name)
    upload(tmp_path / "local", place)
    store = store_at(place)
    assert store.names() == ["alpha", "beta", "beta.mem"]
    assert is_same(store.read("alpha"), saved["alpha"])
    assert store.describe("alpha").problem is None
    before = store.version_of("alpha")
    assert store.version_of("alpha") == before
    time.sleep(0.01)
    saved["beta"].save(tmp_path / "local" / "alpha.mem")
    upload(tmp_path / "local", place)
    assert store.version_of("alpha") != before
    assert is_same(store.read("alpha"), saved["beta"])
    store.keep("alpha", saved["alpha"])
    assert is_same(store.read("alpha"), saved["alpha"])
    assert [each.rpartition(".")[2] for each in listed(place) if each.startswith("alpha")] == ["tar"]
    store.delete("alpha")
    store.delete("beta")
    assert store.names() == ["beta"], "the name is free for the folder beside it"


@of_urls
def test_what_is_not_whole_is_not_there(place, saved):
    store = store_at(place)
    store.keep("alpha", saved["alpha"])
    (kept,) = listed(place)
    now = time.time_ns()
    for name in (f"alpha.mem/{now:020d}-00000001-99999.tar", f"new.mem/{now:020d}-00000001-99999.tar"):
        put(place, name, b"the beginning")
    put(place, "old.mem/00000000000000000001-00000001-99999.tar", b"the beginning, long ago")
    assert store.names() == ["alpha"]
    assert is_same(store.read("alpha"), saved["alpha"])
    store = store_at(place)
    assert not [each for each in listed(place) if each.startswith("old")], "what a killed writer left long ago"
    assert len(listed(place)) == 3, "a writer that may still live is left alone"
    store.keep("alpha", saved["beta"])
    assert is_same(store.read("alpha"), saved["beta"])
    assert kept not in listed(place)
    assert len(listed(place)) == 2, "a later version clears what lies before it"


@of_urls
def test_a_damaged_memory_is_told_and_can_be_deleted(place, saved, tmp_path):
    store = store_at(place)
    store.keep("alpha", saved["alpha"])
    (name,) = listed(place)
    files, root = fsspec.core.url_to_fs(place)
    whole = files.cat_file(f"{root}/{name}")
    cases = {
        "no archive": b"\1" * len(whole),
        "changed": whole.replace(b'"rank": 4', b'"rank": 5', 1) if b'"rank": 4' in whole else None,
        "half": whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2),
    }
    for data in filter(None, cases.values()):
        # A further version: the same bytes are never written twice under one name.
        put(place, f"alpha.mem/{time.time_ns():020d}-00000001-{len(data)}.tar", data)
        with pytest.raises(MemoryFileError, match="'alpha'") as error:
            store.read("alpha")
        assert "/tmp" not in str(error.value)
        assert store.describe("alpha").problem is not None
    store.delete("alpha")
    assert (store.names(), listed(place)) == ([], [])


def test_an_archive_writes_nothing_but_its_files(saved, tmp_path):
    place = f"file://{tmp_path}/store"
    for number, member in enumerate(("../../away", "/tmp/away-memdlm", "x/evil.py")):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            info = tarfile.TarInfo(member)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        put(place, f"m{number}.mem/{1:020d}-00000001-{len(data.getvalue())}.tar", data.getvalue())
        with pytest.raises(MemoryFileError, match="archive is damaged"):
            store_at(place).read(f"m{number}")
    assert not list(tmp_path.rglob("away*"))
    assert not os.path.exists("/tmp/away-memdlm")


@of_every_kind
def test_threads_never_see_half_a_memory(place, saved):
    stores, end, wrong = [store_at(place) for _ in range(3)], time.monotonic() + SECONDS, []
    stores[0].keep("m", saved["alpha"])

    def write(store, seed):
        draw = random.Random(seed)
        while time.monotonic() < end:
            try:
                store.keep("m", saved[draw.choice(sorted(TEXTS))])
            except ConfigError as error:  # a folder has one writer at a time, and says so
                if "://" in place:
                    wrong.append(error)

    def read(store):
        while time.monotonic() < end:
            try:
                found = store.read("m")
                if not any(is_same(found, each) for each in saved.values()):
                    wrong.append("half")
            except Exception as error:
                # A folder's own store may be caught between its two renames.
                if "://" in place:
                    wrong.append(error)

    threads = [threading.Thread(target=write, args=(stores[0], 0))]
    threads += [threading.Thread(target=read, args=(store,)) for store in stores]
    threads += [threading.Thread(target=write, args=(stores[1], 1))] if "://" in place else []
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(saved, tmp_path, monkeypatch):
    store, reads = FolderStore(tmp_path / "store"), []
    store.keep("m", saved["alpha"])

    def shifting(place):
        found = read_memory(place)
        if not reads:
            store.keep("m", saved["beta"])
        reads.append(found)
        return found

    monkeypatch.setattr("memdlm.serving.http.store.read_memory", shifting)
    assert is_same(store.read("m"), saved["beta"])
    assert len(reads) == 2


def test_a_writer_that_is_killed_leaves_the_earlier_memory(saved, tmp_path, monkeypatch):
    place = f"file://{tmp_path}/store"
    store = store_at(place)
    store.keep("m", saved["alpha"])
    reading, writing = os.pipe()

    def slow(self, path, data, **options):
        """Half of it is there, and more would come."""
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.write(writing, b".")
            time.sleep(60)

    writer = os.fork()
    if writer == 0:
        try:
            monkeypatch.setattr(LocalFileSystem, "pipe_file", slow)
            store.keep("m", saved["beta"])
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"."
    assert is_same(store.read("m"), saved["alpha"])
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    assert len(listed(place)) == 2
    for each in (store, store_at(place)):
        assert (each.names(), is_same(each.read("m"), saved["alpha"])) == (["m"], True)
    store.keep("m", saved["beta"])
    assert (len(listed(place)), is_same(store.read("m"), saved["beta"])) == (1, True)


def test_the_local_copies_are_bounded_and_hold_what_is_read(saved, tmp_path):
    store = UrlStore(f"file://{tmp_path}/store", cache_bytes=1)
    for name in TEXTS:
        store.keep(name, saved[name])
    for name in (*TEXTS, *TEXTS):
        assert is_same(store.read(name), saved[name])
    root = Path(store._cache._root.name)
    assert list(root.iterdir()) == []
    store._cache.limit = 2**30
    for name in (*TEXTS, *TEXTS):
        store.read(name)
    assert len(list(root.iterdir())) == len(TEXTS)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(MemoryFileError, match="there is no memory"):
        store.read("alpha")


def test_a_place_that_cannot_be_opened_is_told():
    with pytest.raises(ConfigError, match="nonsense"):
        store_at("nonsense://bucket/memories")
    from fsspec.registry import known_implementations

    driver = next(name for name in ("oss", "tos", "dropbox", "wandb") if name in known_implementations)
    with pytest.raises(MachineError, match=rf"'{driver}://bucket/m' is not installed.*[Ii]nstall"):
        store_at(f"{driver}://user:secret@bucket/m")
    assert shown("s3://user:secret@bucket/m@n") == "s3://bucket/m@n"


def test_a_url_is_served_as_a_folder_is(decoder, saved):
    place = f"memory://served{next(NUMBERS)}"
    with client_of(service_of(decoder, place)) as client:
        reply = client.post("/v1/memories", json={"name": "alpha", "text": TEXTS["alpha"]})
        assert finished(client, reply.json())["status"] == "done"
        for name in ("alpha", "beta"):
            store_at(place).keep("alpha", saved[name])
            body = {"model": BASE, "memory": "alpha", "prompt": "w1 w2"}
            text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            assert text == offline(decoder, "w1 w2", saved[name])
        assert client.get("/v1/memories/alpha/download").status_code == 200
        assert client.delete("/v1/memories/alpha").status_code == 200
        assert client.get("/v1/models/alpha").status_code == 404
