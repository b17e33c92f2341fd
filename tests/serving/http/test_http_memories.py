"""Memories as resources: made from texts and uploads, listed, fetched, deleted, loaded, unloaded; names stay names."""

import io
import json
import tarfile

import pytest
from http_serving import BASE, TEXTS, client_of, decoder_of, finished, offline, service_of, until, written

from memdlm.memory import read_memory
from memdlm.serving.http import memories as routes
from memdlm.serving.http.store import FolderStore, check_name

PROMPT = "w1 w2"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_of(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("memories")


@pytest.fixture(scope="module")
def client(decoder, folder):
    with client_of(service_of(decoder, folder, max_stored=8)) as found:
        yield found


def made(client, **body):
    reply = client.post("/v1/memories", json=body)
    assert reply.status_code == 202, reply.text
    assert reply.headers["location"] == f"/v1/jobs/{reply.json()['id']}"
    return finished(client, reply.json())


def answer(client, model):
    reply = client.post("/v1/completions", json={"model": model, "prompt": PROMPT})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def names(client):
    return [each["id"] for each in client.get("/v1/models").json()["data"][1:]]


def test_a_text_becomes_the_memory_that_it_becomes_offline(client, decoder, folder):
    job = made(client, name="alpha", text=TEXTS["alpha"], seed=3)
    assert (job["status"], job["error"], job["tokens"]) == ("done", None, 6)
    assert job["progress"]["done"] == job["progress"]["total"] > 0
    expected, found = written(decoder, TEXTS["alpha"], seed=3), read_memory(folder / "alpha.mem")
    for module, pair in expected.pairs.items():
        for side, value in pair.items():
            assert (found.pairs[module][side] - value).abs().max() <= 1e-6
    assert answer(client, "alpha") == offline(decoder, PROMPT, found)
    told = client.get("/v1/memories/alpha").json()
    assert (told["tokens"], told["served_as"], told["problem"]) == (6, ["alpha"], None)
    assert str(folder) not in json.dumps([told, client.get("/v1/models").json()])


def test_a_name_is_written_once_unless_it_may_be_replaced(client, decoder):
    made(client, name="twice", text=TEXTS["alpha"])
    before = answer(client, "twice")
    assert client.post("/v1/memories", json={"name": "twice", "text": TEXTS["beta"]}).status_code == 409
    assert made(client, name="twice", text=TEXTS["beta"], overwrite=True)["status"] == "done"
    assert answer(client, "twice") == offline(decoder, PROMPT, written(decoder, TEXTS["beta"])) != before


@pytest.mark.slow
def test_an_upload_is_read_in_a_process_of_its_own(client, decoder, folder):
    page = b"<html><body><p>w1 w2 w3</p><script>w9</script><p>w4 w5 w6</p></body></html>"
    reply = client.post("/v1/memories", files={"file": ("../../page.html", page)}, data={"overwrite": "false"})
    job = finished(client, reply.json())
    assert (job["status"], job["memory"], job["tokens"]) == ("done", "page", 6)
    assert answer(client, "page") == offline(decoder, PROMPT, written(decoder, "w1 w2 w3\nw4 w5 w6"))
    assert client.get("/v1/memories/page").json()["source"] == "page.html"
    assert client.delete("/v1/memories/page").status_code == 200


BAD_UPLOADS = {
    "no file": ({"data": {"name": "x"}, "files": {"other": ("a.txt", b"w1")}}, 400),
    "another kind": ({"files": {"file": ("a.exe", b"MZ")}}, 400),
    "two files": ({"files": [("file", ("a.txt", b"w1")), ("file", ("b.txt", b"w1"))]}, 400),
    "no name": ({"files": {"file": (".txt", b"w1")}}, 400),
    "a name that leads away": ({"files": {"file": ("a.txt", b"w1")}, "data": {"name": "../a"}}, 400),
    "a field too much": ({"files": {"file": ("a.txt", b"w1")}, "data": {"mode": "fast"}}, 400),
    "no switch": ({"files": {"file": ("a.txt", b"w1")}, "data": {"overwrite": "perhaps"}}, 400),
    "no form": ({"content": b"w1", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
    "no boundary": ({"content": b"w1", "headers": {"Content-Type": "multipart/form-data"}}, 400),
    "plain": ({"content": b"w1", "headers": {"Content-Type": "text/plain"}}, 415),
    "nothing": ({}, 415),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused(client, name):
    what, status = BAD_UPLOADS[name]
    reply = client.post("/v1/memories", **what)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


@pytest.mark.slow
def test_an_upload_that_cannot_be_read_fails_its_job(client):
    for name, data, words in (
        ("a.txt", b"\xff\xfe\xff", "'a.txt'"),
        ("a.pdf", b"%PDF-1.4 and no more", "'a.pdf' is no PDF"),
        ("a.html", b"<script>w1</script>", "'a.html' has no text"),
    ):
        job = finished(client, client.post("/v1/memories", files={"file": (name, data)}).json())
        assert job["status"] == "failed"
        assert words in job["error"]["message"]
        assert "/tmp" not in job["error"]["message"]
    assert "a" not in names(client)


@pytest.mark.slow
def test_a_reader_of_uploads_is_stopped_at_its_limits(monkeypatch):
    import asyncio

    from memdlm.serving.http import reading

    async def read(seconds, mib, data):
        monkeypatch.setattr(reading, "MIB", mib)
        return await reading.UploadReader(seconds).read(data, "a.html")

    deep = b"<p>w1" + b"<div>" * 400_000
    for seconds, mib in ((1, 1024), (60, 1)):
        with pytest.raises(ValueError, match=r"a\.html"):
            asyncio.run(read(seconds, mib, deep))
    assert asyncio.run(read(60, 1024, b"<p>w1 w2")).text == "w1 w2"


BAD_NAMES = (
    "..",
    ".",
    "a/b",
    "../a",
    "a\\b",
    "a\0b",
    ".hidden",
    "a..b",
    "-a",
    "a.",
    "a.mem",
    "",
    " a",
    "a b",
    "\u00e9",
    "a" * 129,
)


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_no_name_leaves_its_folder(client, folder, name):
    before = sorted(folder.parent.iterdir())
    reply = client.post("/v1/memories", json={"name": name, "text": "w1"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "name")
    for method in ("GET", "DELETE"):
        if name not in ("", "."):  # as part of an address, those two are nothing
            assert client.request(method, f"/v1/memories/{_quoted(name)}").status_code in (404, 405)
    assert sorted(folder.parent.iterdir()) == before
    with pytest.raises(ValueError, match="name must have"):
        check_name(name)


def _quoted(name):
    from urllib.parse import quote

    return quote(name, safe="")


def test_a_download_is_the_memory(client, folder, tmp_path):
    made(client, name="fetched", text=TEXTS["beta"], overwrite=True)
    reply = client.get("/v1/memories/fetched/download")
    assert reply.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(reply.content)) as tar:
        tar.extractall(tmp_path, filter="data")
    found, kept = read_memory(tmp_path / "fetched.mem"), read_memory(folder / "fetched.mem")
    assert found.provenance == kept.provenance
    assert client.delete("/v1/memories/fetched").json() == {"id": "fetched", "object": "memory", "deleted": True}
    assert not (folder / "fetched.mem").exists()
    assert client.get("/v1/memories/fetched/download").status_code == 404
    assert client.delete("/v1/memories/fetched").status_code == 404
    assert "fetched" not in names(client)


def test_memories_are_loaded_and_unloaded_as_vllm_does(client, decoder, folder):
    written(decoder, TEXTS["beta"]).save(folder / "kept.mem")
    assert "kept" in names(client), "what another program puts there is served"

    def call(action, status=200, **body):
        reply = client.post(f"/v1/{action}_lora_adapter", json=body)
        assert reply.status_code == status, reply.text
        return reply.text

    assert call("unload", lora_name="kept") == "Success: LoRA adapter 'kept' removed successfully."
    assert "kept" not in names(client)
    assert client.post("/v1/completions", json={"model": "kept", "prompt": PROMPT}).status_code == 404
    call("unload", 404, lora_name="kept")
    words = call("load", lora_name="other", lora_path="kept.mem")
    assert words == "Success: LoRA adapter 'other' added successfully."
    assert answer(client, "other") == offline(decoder, PROMPT, written(decoder, TEXTS["beta"]))
    call("load", 400, lora_name="other", lora_path="kept.mem")
    assert client.post("/v1/memories", json={"name": "other", "text": "w1", "overwrite": True}).status_code == 409
    call("load", lora_name="other", lora_path=str(folder / "kept.mem"), load_inplace=True)
    call("load", 400, lora_name=BASE, lora_path="kept.mem")
    for place in ("..", "../kept.mem", "/etc", "nothing", "kept.mem/memory.json", "\0", "~"):
        call("load", 404, lora_name="away", lora_path=place)
    call("unload", lora_name="other")
    call("load", lora_name="kept", lora_path="kept.mem")
    assert "kept" in names(client)
    client.delete("/v1/memories/kept")


def test_a_memory_that_was_replaced_on_the_disk_is_read_again(client, decoder, folder):
    for name in TEXTS:
        written(decoder, TEXTS[name]).save(folder / "shifting.mem")
        assert answer(client, "shifting") == offline(decoder, PROMPT, written(decoder, TEXTS[name]))
    client.delete("/v1/memories/shifting")


def test_a_damaged_memory_is_listed_and_refused(client, decoder, folder):
    written(decoder, TEXTS["beta"]).save(folder / "damaged.mem")
    weights = folder / "damaged.mem" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    told = client.get("/v1/memories/damaged").json()
    assert "checksum" in told["problem"]
    reply = client.post("/v1/completions", json={"model": "damaged", "prompt": PROMPT})
    assert reply.status_code == 400
    assert "checksum" in reply.json()["error"]["message"]
    assert str(folder) not in reply.text + json.dumps(told)
    assert client.delete("/v1/memories/damaged").status_code == 200


def test_the_number_of_memories_is_limited(client, decoder, folder):
    while len(names(client)) < 8:
        written(decoder, TEXTS["beta"]).save(folder / f"more{len(names(client))}.mem")
    assert client.post("/v1/memories", json={"name": "last", "text": "w1"}).status_code == 403


def test_a_text_that_is_too_long_fails_its_job(decoder, tmp_path):
    with client_of(service_of(decoder, tmp_path / "m", max_text_tokens=4)) as client:
        job = made(client, name="long", text="w1 w2 w3 w4 w5")
        assert (job["status"], client.get("/v1/memories").json()["data"]) == ("failed", [])
        assert "5 tokens; from 1 to 4" in job["error"]["message"]


def test_clients_change_nothing_where_they_may_not(decoder, tmp_path):
    written(decoder, TEXTS["beta"]).save(tmp_path / "kept.mem")
    with client_of(service_of(decoder, tmp_path, read_only=True)) as client:
        for method, path, body in (
            ("POST", "/v1/memories", {"name": "x", "text": "w1"}),
            ("DELETE", "/v1/memories/kept", None),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "kept.mem"}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "kept"}),
        ):
            assert client.request(method, path, json=body).status_code == 403
        assert client.get("/v1/memories/kept/download").status_code == 200
    with client_of(service_of(decoder)) as client:
        assert client.post("/v1/memories", json={"name": "x", "text": "w1"}).status_code == 404
        assert client.get("/v1/memories").json()["data"] == []
        error = client.post("/v1/completions", json={"model": "kept", "prompt": PROMPT}).json()["error"]
        assert "--memories" in error["message"]


def test_a_job_can_be_given_up(decoder, tmp_path, monkeypatch):
    import asyncio

    async def waits(*args):
        await asyncio.sleep(60)

    service = service_of(decoder, tmp_path / "m")
    monkeypatch.setattr(routes, "_queued", waits)
    with client_of(service) as client:
        job = client.post("/v1/memories", json={"name": "x", "text": "w1"}).json()
        assert client.post("/v1/memories", json={"name": "x", "text": "w1"}).status_code == 409
        assert client.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
        until(lambda: client.get("/v1/jobs").json()["data"][0]["status"] == "cancelled")
        assert client.get("/v1/jobs/none").status_code == 404


# The store by itself. -----------------------------------------------------------------------------------------------


def test_what_a_killed_server_left_is_cleared_and_restored(decoder, tmp_path):
    saved = written(decoder, TEXTS["alpha"])
    for name in ("half", "lost", "kept"):
        saved.save(tmp_path / f"{name}.mem")
    # A number that no process has: above the most that Linux gives.
    (tmp_path / "half.mem").rename(tmp_path / ".half.mem.99999999.tmp")
    (tmp_path / "lost.mem").rename(tmp_path / ".lost.mem.99999999.old")
    store = FolderStore(tmp_path)
    assert store.names() == ["kept", "lost"]
    assert store.read("lost").provenance == saved.provenance
    assert not [each for each in tmp_path.iterdir() if each.suffix in (".tmp", ".old")]


def test_a_folder_keeps_its_whole_name_where_the_short_one_is_taken(decoder, tmp_path):
    saved = written(decoder, TEXTS["alpha"])
    for name in ("a", "a.mem", "b.mem"):
        saved.save(tmp_path / name)
    store = FolderStore(tmp_path)
    assert store.names() == ["a", "a.mem", "b"]
    assert [store.place_of(name) for name in store.names()] == ["a", "a.mem", "b.mem"]
    assert [store.name_at(place) for place in ("a", "a.mem", "b.mem")] == store.names()
