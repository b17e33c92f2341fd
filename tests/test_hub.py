"""A hub that does not answer costs one short question, not minutes of retries."""

import logging
import socket
import sys
import time
import urllib.error

import pytest
from huggingface_hub import constants

from memdlm import hub
from memdlm.data.sources import load_conversations
from memdlm.errors import CheckpointError, DataError
from memdlm.models import load_model


@pytest.fixture
def online(monkeypatch):
    """As if nothing had been asked yet, and everything as it was afterwards."""
    import datasets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked = hub._ask
    asked.cache_clear()
    yield monkeypatch
    asked.cache_clear()


@pytest.fixture
def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_silent_hub_is_asked_once(online, closed_port, caplog):
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="the hub cannot be asked"):
        load_model("no-one/nothing")
    with pytest.raises(DataError, match="neither as a local path nor from the hub"):
        load_conversations("no-one/nothing")
    assert time.perf_counter() - start < 10
    assert sum("does not answer" in record.message for record in caplog.records) == 1
    assert constants.is_offline_mode()
    assert sys.modules["datasets.config"].HF_HUB_OFFLINE


@pytest.mark.parametrize("answer", [None, urllib.error.HTTPError("x", 503, "busy", None, None)])
def test_a_hub_that_answers_stays_in_use(online, answer):
    asked = []

    class Reply:
        def close(self):
            pass

    def urlopen(request, timeout):
        asked.append(request.get_method())
        if answer is not None:
            raise answer
        return Reply()

    online.setattr(hub.urllib.request, "urlopen", urlopen)
    for _ in range(3):
        hub.look_for("no-one/nothing")
    assert asked == ["HEAD"]
    assert not constants.is_offline_mode()


def test_who_decides_by_the_environment_is_not_asked_for(online, tmp_path):
    online.setattr(hub, "_ask", lambda: pytest.fail("asked"))
    hub.look_for(tmp_path)
    online.setenv("HF_HUB_OFFLINE", "0")
    hub.look_for("no-one/nothing")
