"""The options of the Ray application: the flags of `memdlm serve`, as texts or values. Ray is not needed for them."""

import subprocess
import sys

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from memdlm.errors import ConfigError
from memdlm.inference import GenerationConfig
from memdlm.memory import MemoryConfig
from memdlm.serving.http.guards import of_this_machine
from memdlm.serving.ray_app.options import parsed


def test_texts_and_values_mean_the_same():
    texts = {"model": "m", "memories": "s3://b/m", "replicas": "2", "gpus": "0.5", "max_new_tokens": "16"}
    texts |= {"mem_inner_rank": "4", "read_only": "true", "routed_by_memory": "False", "temperature": "0"}
    values = {"model": "m", "memories": "s3://b/m", "replicas": 2, "gpus": 0.5, "max_new_tokens": 16}
    values |= {"mem_inner_rank": 4, "read_only": True, "routed_by_memory": False, "temperature": 0.0}
    assert parsed(texts) == parsed(values)
    options, config, memory = parsed(values)
    assert (options.replicas, options.gpus, options.read_only, options.routed_by_memory) == (2, 0.5, True, False)
    assert (config, memory) == (GenerationConfig(max_new_tokens=16), MemoryConfig(inner_rank=4))
    assert parsed({"model": "m"})[2] is None
    assert (options.at_once, parsed({"model": "m", "max_ongoing": "3"})[0].at_once) == (2 * options.slots, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "m", "replica": 2}, "replica.*replicas"),
        ({"model": "m", "replicas": "two"}, "replicas='two' is not possible"),
        ({"model": "m", "replicas": 0}, "replicas"),
        ({"model": "m", "port": 1}, "port=1 has no effect here"),
        ({"model": "m", "mem_inner_rank": 4}, "no effect without memory"),
        ({"model": "m", "read_only": True}, "read_only has no effect"),
        ({"replicas": 2}, "model is missing"),
    ],
)
def test_what_is_not_possible_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        parsed(given)


def test_the_package_is_without_ray():
    code = "import sys, memdlm.serving, memdlm.serving.ray_app.options; print('ray' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("address", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 403), ("testclient", 403), ("", 403)]
)
def test_without_a_key_other_machines_are_refused(address, status):
    client = TestClient(of_this_machine(PlainTextResponse("in")), client=(address, 5000))
    assert client.get("/", headers={"X-Forwarded-For": "127.0.0.1"}).status_code == status
