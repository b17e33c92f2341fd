"""A real server on a real port: the official client, clients that vanish, dawdle or ask too much."""

import dataclasses
import json
import socket
import time

import pytest
from http_serving import BASE, TEXTS, decoder_of, offline, running, service_of, until, written

openai = pytest.importorskip("openai")

LONG = {"model": BASE, "prompt": "w1", "max_tokens": 600, "block_size": 600, "steps": 600}
"""An answer that takes long."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_of(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(decoder, tmp_path_factory):
    """A server with a small queue and little patience: (service, port)."""
    folder = tmp_path_factory.mktemp("memories")
    for name, text in TEXTS.items():
        written(decoder, text).save(folder / f"{name}.mem")
    service = service_of(decoder, folder, slots=2, queue_limit=1, port=0, body_seconds=1.0, drain_seconds=1.0)
    with running(service) as port:
        yield service, port


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served[1]}/v1", api_key="none", max_retries=0) as found:
        yield found


MESSAGES = [{"role": "user", "content": "w3 w1"}]


def test_the_official_client_gets_the_offline_answers(client, decoder):
    assert [each.id for each in client.models.list()] == [BASE, *sorted(TEXTS)]
    for name, text in TEXTS.items():
        saved = written(decoder, text)
        found = client.chat.completions.create(model=name, messages=MESSAGES)
        assert found.choices[0].message.content == offline(decoder, MESSAGES, saved)
        found = client.chat.completions.create(model=BASE, messages=MESSAGES, extra_body={"memory": name})
        assert found.choices[0].message.content == offline(decoder, MESSAGES, saved)
        found = client.completions.create(model=f"{BASE}:{name}", prompt="w1 w2", seed=3, temperature=0.7)
        assert found.choices[0].text == offline(decoder, "w1 w2", saved, seed=3, temperature=0.7)
        assert found.usage.prompt_tokens == 2


def test_the_official_stream_helper_collects_the_answer(client, decoder):
    whole = offline(decoder, MESSAGES, written(decoder, TEXTS["alpha"]))
    # The helper raises for an answer that its length ends, so this one ends before its last word.
    last = whole.split()[-1]
    expected = whole[: whole.index(last)]
    options = {"include_usage": True, "include_steps": True}
    asked = {"model": "alpha", "messages": MESSAGES, "stop": last, "stream_options": options}
    with client.chat.completions.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "".join(deltas) == expected
    assert final.choices[0].finish_reason == "stop"
    assert final.usage.total_tokens > 0
    pieces = list(client.completions.create(model="alpha", prompt="w1", stream=True))
    assert "".join(each.choices[0].text for each in pieces) == offline(decoder, "w1", written(decoder, TEXTS["alpha"]))


def test_the_official_client_knows_the_errors(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="logprobs") as caught:
        client.chat.completions.create(model=BASE, messages=MESSAGES, logprobs=True)
    assert caught.value.param == "logprobs"


def test_the_log_has_paths_and_no_queries(served, caplog):
    with caplog.at_level("INFO", logger="uvicorn.access"):
        with opened(served[1]) as connection:
            connection.sendall(b"GET /health?api_key=secret HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            while connection.recv(4096):
                pass
        until(lambda: "GET /health HTTP" in caplog.text)
    assert "secret" not in caplog.text


def opened(port):
    found = socket.create_connection(("127.0.0.1", port), timeout=120)
    return found


def request_of(body, **headers):
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def idle(service):
    return lambda: service.engine.figures().running == service.engine.figures().waiting == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_vanishes_frees_its_slot(served, is_stream):
    service, port = served
    before = service.engine.figures().cancelled
    with opened(port) as connection:
        connection.sendall(request_of({**LONG, "stream": is_stream}))
        until(lambda: service.engine.figures().running == 1)
        if is_stream:
            assert b"200 OK" in connection.recv(4096)
    until(idle(service))
    assert service.engine.figures().cancelled == before + 1


def test_a_full_queue_says_when_to_come_again(served, client):
    service, port = served
    held = []
    try:
        # Two answers run, one waits: the fourth is too much.
        for state in ((1, 0), (2, 0), (2, 1)):
            held.append(opened(port))
            held[-1].sendall(request_of(LONG))
            until(lambda state=state: state_of(service) == state)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=BASE, prompt="w1")
        assert int(caught.value.response.headers["retry-after"]) >= 1
    finally:
        for each in held:
            each.close()
    until(idle(service))
    client.completions.create(model=BASE, prompt="w1")


def state_of(service):
    now = service.engine.figures()
    return now.running, now.waiting


def test_a_request_has_its_time_and_no_more(served, client):
    service, _ = served
    patient = service.options
    service.options = dataclasses.replace(patient, request_seconds=0.3)
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=BASE, prompt="w1", extra_body=strip(LONG), max_tokens=600)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="time on this server is over"):
            list(
                client.completions.create(model=BASE, prompt="w1", stream=True, extra_body=strip(LONG), max_tokens=600)
            )
    finally:
        service.options = patient
    until(idle(service))


def strip(body):
    return {name: value for name, value in body.items() if name not in ("model", "prompt", "max_tokens")}


SLOW = {
    "nothing": b"",
    "half a line": b"POST /v1/compl",
    "half of the headers": b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n",
    "half of a body": request_of({"model": BASE})[:-5],
}


@pytest.mark.parametrize("what", SLOW)
def test_a_slow_sender_is_hung_up_on(served, what):
    start = time.monotonic()
    with opened(served[1]) as connection:
        connection.sendall(SLOW[what])
        got = b""
        while piece := connection.recv(4096):
            got += piece
    assert time.monotonic() - start > 0.9
    assert (b"408 Request Timeout" in got) if what == "half of a body" else got == b""


def test_a_second_request_of_a_connection_may_not_dawdle_either(served):
    with opened(served[1]) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea")
        got = b""
        while piece := connection.recv(4096):
            got += piece
    assert got.count(b"200 OK") == 1


@pytest.mark.slow
def test_a_quick_sender_is_let_be(served):
    """Headers in pieces, an answer that takes longer than a client has for its headers, and another one after it."""
    with opened(served[1]) as connection:
        for _ in range(2):
            text = request_of({**LONG, "max_tokens": 300, "block_size": 300, "steps": 300})
            for start in range(0, len(text), 60):
                connection.sendall(text[start : start + 60])
                time.sleep(0.02)
            got = b""
            while b'"usage"' not in got:
                piece = connection.recv(2**16)
                assert piece
                got += piece
            assert b"200 OK" in got


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"A" * 100_000, b"GET /\x00 HTTP/1.1\r\n\r\n"]
)
def test_what_is_no_request_is_answered_and_forgotten(served, junk):
    with opened(served[1]) as connection:
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(4096).startswith((b"HTTP/1.1 4", b""))
    assert served[0].is_alive()
