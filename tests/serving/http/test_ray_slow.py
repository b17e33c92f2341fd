"""Two replicas on one machine: a load over eight memories without an error, and all routes of one server."""

import importlib.util
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.slow
if importlib.util.find_spec("ray") is None:
    pytest.skip("needs the extra ray: pip install 'memdlm[ray]'", allow_module_level=True)

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CLIENTS, MEMORIES, SECONDS, REPLICAS = 16, 8, 20, 2


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    import serving_ray

    yield serving_ray
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def started(bench, tmp_path_factory):
    """A running application; yields its address, and what every memory answers offline."""
    from ray import serve

    from memdlm.serving.ray_app import app

    folder = tmp_path_factory.mktemp("ray")
    expected = bench.prepared(folder, MEMORIES)
    with bench.machine(REPLICAS) as address:
        given = {"model": str(folder / "model"), "memories": f"file://{folder}/memories", "replicas": REPLICAS}
        given |= {"dtype": "float32", "device": "cpu", "memories_per_replica": MEMORIES // REPLICAS}
        given |= {f"mem_{name}": getattr(bench.MEMORY, name) for name in ("num_inner_steps", "inner_rank", "inner_lr")}
        serve.run(app({**given, **bench.DECODING}))
        yield address, expected


@pytest.fixture
def client(started):
    with httpx.Client(base_url=started[0], timeout=60) as found:
        yield found


def counted(client):
    lines = [each for each in client.get("/metrics").text.splitlines() if each.startswith("memdlm:routed_requests_t")]
    return {line.split("{")[1].split("}")[0]: float(line.split()[-1]) for line in lines}


def test_a_load_over_eight_memories_meets_its_memories(bench, started, client):
    address, expected = started
    before = counted(client)
    found = bench.load(address, expected, CLIENTS, SECONDS)
    assert found["wrong"] == []
    replicas = {name.split()[0] for name in found["by_replica"]}
    assert len(replicas) == REPLICAS
    after = counted(client)
    read = {name: count - before.get(name, 0) for name, count in after.items() if 'memory="none"' not in name}
    assert sum(read.values()) == found["answers"], "the metrics count what the clients were told"
    assert sum(count for name, count in read.items() if 'memory="here"' in name) / found["answers"] == pytest.approx(
        found["share_here"]
    )
    print(f"{found['answers']} answers, {found['share_here']:.1%} met their memory; {found['by_replica']}")
    # Four of eight memories fit into a replica: by chance, half of the requests would meet theirs.
    assert found["share_here"] > 0.6


def test_openais_client_finds_what_one_server_has(started):
    import openai

    address, expected = started
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [each.id for each in client.models.list()][:2] == ["model", "m0"]
    (memory, prompt), text = next(iter(expected.items()))
    for model in (memory, f"model:{memory}"):
        assert client.completions.create(model=model, prompt=prompt).choices[0].text == text
    parts = client.completions.create(model=memory, prompt=prompt, stream=True)
    assert "".join(each.choices[0].text for each in parts) == text
    with pytest.raises(openai.NotFoundError, match="'nothing' does not exist"):
        client.completions.create(model="nothing", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.completions.create(model=memory, prompt=prompt, logprobs=1)


def test_a_memory_is_written_by_one_replica_and_read_by_all(client):
    job = client.post("/v1/memories", json={"name": "new", "text": "w01 w02 w03 w04"}).json()
    while client.get(f"/v1/jobs/{job['id']}").json()["status"] in ("queued", "writing"):
        time.sleep(0.05)
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "done"
    met = set()
    for _ in range(100):
        reply = client.get("/v1/memories/new")
        assert reply.json()["problem"] is None
        met.add(reply.headers["x-memdlm-replica"])
        if len(met) == REPLICAS:
            break
    assert client.delete("/v1/memories/new").json()["deleted"]
    assert client.post("/v1/completions", json={"model": "new", "prompt": "w01"}).status_code == 404
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "m0.mem"}).status_code == 404


def test_errors_and_guards_are_those_of_one_server(client):
    for request, status in (
        ({"method": "POST", "url": "/v1/completions", "json": {"prompt": "w01"}}, 400),
        ({"method": "POST", "url": "/v1/completions", "json": {"model": "m0", "memory": "m1", "prompt": "w01"}}, 400),
        ({"method": "GET", "url": "/nothing"}, 404),
        ({"method": "GET", "url": "/v1/jobs/none"}, 404),
        ({"method": "GET", "url": "/v1/models", "headers": {"Host": "elsewhere.example"}}, 403),
        ({"method": "GET", "url": "/v1/models", "headers": {"Origin": "http://elsewhere.example"}}, 403),
        ({"method": "POST", "url": "/v1/completions", "content": b" " * (3 * 2**20)}, 413),
    ):
        reply = client.request(**request)
        assert reply.status_code == status, reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_clients_that_leave_free_their_slots(started, client):
    # Alone, this answer takes more than a minute. Several are asked for: a replica that is busy would not be asked how
    # busy it is while the other is idle.
    body = {"model": "model", "prompt": "w01", "max_tokens": 2000, "block_size": 2000, "steps": 2000, "stream": True}
    left, statuses = threading.Event(), []

    def ask():
        with httpx.stream("POST", f"{started[0]}/v1/completions", json=body, timeout=60) as reply:
            statuses.append(reply.status_code)
            left.wait(60)

    def until(is_so):
        end, told = time.monotonic() + 30, {}
        while not (len(told) == REPLICAS and is_so(told)):
            assert time.monotonic() < end, (told, statuses)
            reply = client.get("/v1/server")
            now = reply.json()["now"]
            told[reply.headers["x-memdlm-replica"]] = now["running"] + now["waiting"]

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for each in threads:
        each.start()
    try:
        until(lambda told: all(told.values()) and sum(told.values()) == len(threads))
    finally:
        left.set()
        for each in threads:
            each.join()
    assert statuses == [200] * len(threads)
    until(lambda told: not any(told.values()))
