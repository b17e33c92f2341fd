"""What a download says of itself is held against bounds before it takes memory: sizes, chat templates, folders."""

import json
import shutil
import time
from pathlib import Path

import pytest

from memdlm.errors import CheckpointError
from memdlm.models import load_model, load_tokenizer
from memdlm.models.hub.chat_templates import check_template
from memdlm.models.lora.adapters import LoRAOptions, add_outer_lora
from memdlm.models.lora.files import is_adapter, save_outer_adapter

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llada", "n_layers", 10**7),
        ("llada", "d_model", 10**8),
        ("llada", "vocab_size", 10**12),
        ("lladamoe", "num_experts", 10**30),
        ("llada21", "intermediate_size", 10**9),
        ("llada21", "num_hidden_layers", "x"),
        ("lladamoe", "hidden_size", -1),
        ("llada21", "pad_token_id", {}),
        ("llada", "rope_theta", "x"),
        ("lladamoe", "architectures", 3),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_at_once(tmp_path, family, field, value):
    shutil.copytree(GOLDEN / family / "checkpoint", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, field: value}))
    start = time.process_time()
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "m")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**9 }}",
        "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
    ],
)
def test_a_template_without_end_is_refused(template):
    with pytest.raises(CheckpointError, match="the chat template does not end"):
        check_template(template, "here")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] ~ ': ' ~ m['content'] }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m['content'] * 3 }}{% endgeneration %}{% break %}{% endfor %}",
        "{{ raise_exception('no system role') }}",
    ],
)
def test_other_templates_pass(template):
    check_template(template, "here")


@pytest.mark.parametrize("kind", ["alone", "tokenizer", "config", "both"])
def test_an_adapter_is_one_whatever_lies_beside_it(tmp_path, kind):
    base = GOLDEN / "llada" / "checkpoint"
    adapter = tmp_path / "adapter"
    save_outer_adapter(add_outer_lora(load_model(base), LoRAOptions(r=2, lora_alpha=4), base=str(base)), adapter)
    if kind in ("tokenizer", "both"):
        for path in base.glob("tokenizer*"):
            shutil.copy(path, adapter)
    if kind in ("config", "both"):
        shutil.copy(base / "config.json", adapter)
    assert is_adapter(adapter)
    assert any("lora" in name for name, _ in load_model(adapter).named_parameters())
    assert load_tokenizer(adapter).chat_template == load_tokenizer(base).chat_template


def test_a_model_with_its_own_adapter_inside_says_so(tmp_path):
    base = tmp_path / "m"
    shutil.copytree(GOLDEN / "llada" / "checkpoint", base)
    save_outer_adapter(add_outer_lora(load_model(base), LoRAOptions(r=2, lora_alpha=4), base=str(base)), base)
    with pytest.raises(CheckpointError, match="holds the adapter and, it says, the base model too"):
        load_model(base)
