"""Who may ask, from where, how much: keys, other web sites, sizes, and what the options refuse."""

import logging

import pytest
from http_serving import BASE, client_of, decoder_of, service_of

from memdlm.errors import ConfigError, MachineError
from memdlm.serving.http.guards import OPEN
from memdlm.serving.http.options import KEY_VARIABLE, Secret, ServerOptions, api_key
from memdlm.workflows.sessions.serve import ServeOptions, check_installed, listening

KEY = "a-key-that-nobody-guesses-0123"
BODY = {"model": BASE, "prompt": "w1", "max_tokens": 1}
PROTECTED = ("/v1/models", "/v1/memories", "/v1/jobs", "/v1/server", "/metrics", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_of(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(decoder):
    with client_of(service_of(decoder, max_body_mib=1)) as found:
        yield found


@pytest.fixture(scope="module")
def locked(decoder):
    with client_of(service_of(decoder, key=Secret(KEY))) as found:
        yield found


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", PROTECTED)
def test_with_a_key_nothing_is_shown_without_it(locked, path):
    for headers in ({}, bearer("wrong"), bearer(KEY[:-1]), bearer(f"{KEY}x"), {"Authorization": f"Basic {KEY}"}):
        reply = locked.get(path, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert locked.get(f"{path}?api_key={KEY}").status_code == 401
    assert locked.get(path, headers=bearer(KEY)).status_code in (200, 404)


def test_with_a_key_the_page_and_the_health_are_open(locked):
    for path in OPEN:
        assert locked.get(path).status_code == 200
    assert locked.post("/v1/completions", json=BODY).status_code == 401
    assert locked.post("/v1/completions", json=BODY, headers=bearer(KEY)).status_code == 200


def test_a_key_is_in_no_log_and_no_message(locked, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        locked.get("/v1/models", headers=bearer(KEY))
        locked.post("/v1/completions", json={"model": 1}, headers=bearer(KEY))
        locked.get("/v1/models", headers=bearer(f"{KEY}x"))
    assert KEY not in caplog.text + "".join(capfd.readouterr())
    assert KEY not in repr(Secret(KEY)) + str(Secret(KEY)) + repr([Secret(KEY)])


FOREIGN = (
    {"Host": "evil.example"},
    {"Host": "evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": ""},
    {"Host": "["},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1234"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_without_a_key_other_web_sites_are_kept_out(client, locked, headers):
    assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 403
    assert locked.post("/v1/completions", json=BODY, headers={**headers, **bearer(KEY)}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:80", "localhost:8000", "[::1]:80"])
def test_the_servers_own_names_are_let_in(client, host):
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200


def test_a_body_is_limited_whether_its_length_is_said_or_not(client):
    large = b'{"model": "' + b"x" * 2**20 + b'"}'
    kind = {"Content-Type": "application/json"}
    for content in (large, iter([large[: 2**19], large[2**19 :]])):
        reply = client.post("/v1/completions", content=content, headers=kind)
        assert reply.status_code == 413
        assert "1 MiB" in reply.json()["error"]["message"]
    for said in ("-1", "1e3", "x", "\u0663".encode(), "9" * 30):
        reply = client.post("/v1/completions", content=b"{}", headers={**kind, "Content-Length": said})
        assert reply.status_code in (400, 413)


def test_every_response_is_guarded(client):
    for path in ("/", "/page.js", "/v1/models", "/nothing", "/health"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "'unsafe" not in headers["content-security-policy"]


def test_the_page_is_whole_by_itself(client):
    page = client.get("/").text
    assert "http" not in page.replace("http-equiv", ""), "no outside assets"
    assert " style=" not in page
    assert "onclick" not in page
    for name in ("page.css", "page.js"):
        assert name in page
        assert "http" not in client.get(f"/{name}").text.replace("https", "")


def test_errors_of_the_routing_have_openais_form_too(client):
    for method, path, status in (("GET", "/nothing", 404), ("PUT", "/v1/models", 405), ("GET", "/v1/completions", 405)):
        reply = client.request(method, path)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_server_that_drains_takes_no_more(decoder):
    service = service_of(decoder)
    with client_of(service) as client:
        assert client.get("/ready").status_code == 200
        service.is_draining = True
        reply = client.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
    assert not service.is_alive()


# Options. -----------------------------------------------------------------------------------------------------------


def test_another_address_needs_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        assert api_key(ServerOptions(host=host)) is None
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="api_key_file"):
            api_key(ServerOptions(host=host))
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert api_key(ServerOptions(host="0.0.0.0")) == Secret(KEY)
    import os

    assert KEY_VARIABLE not in os.environ, "no process that is started later has it"
    file = tmp_path / "key"
    file.write_text(f"{KEY}\nnotes\n")
    assert api_key(ServerOptions(host="0.0.0.0", api_key_file=str(file))) == Secret(KEY)


@pytest.mark.parametrize("text", ["", "short", "a key with spaces in it", "\u00e9" * 20, "\n" + KEY])
def test_a_bad_key_is_refused_and_not_shown(tmp_path, text):
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(ConfigError, match="first line") as caught:
        api_key(ServerOptions(api_key_file=str(file)))
    assert not text.strip() or text.strip() not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        api_key(ServerOptions(api_key_file=str(tmp_path / "none")))


def test_options_that_cannot_take_effect_are_refused():
    with pytest.raises(ConfigError, match="read_only"):
        ServeOptions(model="x", read_only=True)
    for name in (" ", "a:b"):
        with pytest.raises(ConfigError, match="served_model_name"):
            ServeOptions(model="x", served_model_name=name)
    with pytest.raises(ConfigError, match="--model"):
        ServeOptions()
    for bad in ({"port": 70000}, {"max_tokens": 0}, {"request_seconds": 0.0}, {"slots": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            ServeOptions(model="x", **bad)


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded():
    with listening(ServerOptions(port=0)) as opened:
        opened.listen()
        with pytest.raises(MachineError, match=r"Another program listens there. Choose another --port"):
            listening(ServerOptions(port=opened.getsockname()[1]))
    with pytest.raises(ConfigError, match="no address"):
        listening(ServerOptions(host="no such host"))


def test_a_missing_extra_says_how_to_install_it():
    with pytest.raises(MachineError, match=r"serving needs fastapi, uvicorn.*pip install 'memdlm\[serve\]'"):
        check_installed(find=lambda name: None)
    check_installed()
