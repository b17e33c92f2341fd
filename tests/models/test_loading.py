"""Folders load by name whatever they call themselves, save back as they came, and are refused with the reason."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import CheckpointError, ConfigError
from memdlm.models import load_model, load_tokenizer, model_skeleton, register
from memdlm.models.blocks.names import renamings
from memdlm.models.blocks.published import config_class_for
from memdlm.models.blocks.stacking import give_back
from tiny import A2D, CONFIGS, random_ids, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
PUBLISHED = {"llada": "llada", "lladamoe": "lladamoe", "llada2": "llada2_moe"}
NAMES = {  # a few names of each family's published files
    "llada": {
        "model.transformer.wte.weight",
        "model.transformer.ff_out.weight",
        "model.transformer.ln_f.weight",
        "model.transformer.blocks.2.attn_out.weight",
        "model.transformer.blocks.0.ff_proj.weight",
        "model.transformer.blocks.0.ff_out.weight",
    },
    "lladamoe": {
        "model.layers.1.mlp.experts.5.gate_proj.weight",
        "model.layers.1.shared_expert.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.2.mlp.expert_bias",
    },
    "llada2": {
        "model.word_embeddings.weight",
        "model.layers.0.attention.query_key_value.weight",
        "model.layers.1.attention.dense.weight",
        "model.layers.1.attention.key_layernorm.weight",
        "model.layers.1.mlp.gate.expert_bias",
        "model.layers.2.mlp.experts.7.up_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
    },
}


def in_fresh_process(code, cwd=None, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def edit(folder, **fields):
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def saved(tmp_path, request):
    model = tiny(request.param)
    model.save_pretrained(tmp_path)
    return request.param, model, tmp_path


def all_saved(*families):
    return pytest.mark.parametrize("saved", families or sorted(CONFIGS), indirect=True)


def to_ours(name, table):
    """What loading makes of a published name."""
    for renaming in renamings(table):
        name, _ = renaming.rename_source_key(name)
    return name


@pytest.mark.parametrize("family", sorted(NAMES))
def test_names_on_disk_are_the_published_ones(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names >= NAMES[family]
    assert not any("gate_up" in name or "self_attn" in name for name in names) or family == "lladamoe"
    for name in names:
        ours = to_ours(name, model.published_names)
        assert model.published_module_name(ours) == name
        assert to_ours(ours, model.published_names) == ours


@all_saved()
@pytest.mark.parametrize("auto", [False, True])
def test_a_folder_loads_whatever_model_type_it_states(saved, auto):
    """The published LLaDA-MoE says `llada`, LLaDA2.1 says one of three."""
    family, model, folder = saved
    register()
    stated = {"llada2": ["llada2_moe", "llada21_moe", "llada2_moe_21"], "lladamoe": ["lladamoe", "llada"]}
    for model_type in stated.get(family, [model.config.model_type]):
        edit(folder, model_type=model_type)
        again = AutoModelForMaskedLM.from_pretrained(folder) if auto else load_model(folder)
        assert type(again) is type(model)
        assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
        assert all(again.state_dict()[name].equal(value) for name, value in model.state_dict().items())
        again.save_pretrained(folder / "again")
        written = json.loads((folder / "again" / "config.json").read_text())
        assert written["model_type"] == model_type
        assert written["architectures"] == [type(model).__name__]
        assert "published_model_type" not in written


@all_saved("llada", "lladamoe", "llada2")
def test_the_body_alone_loads_from_the_same_folder(saved):
    _, model, folder = saved
    register()
    body = AutoModel.from_pretrained(folder)
    ids = random_ids(1, 5)
    assert body(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)


@all_saved("llada", "lladamoe", "llada2")
def test_architectures_then_fields_then_tensor_names_decide(saved):
    family, model, folder = saved
    spelled = type(model).__name__.swapcase()
    edit(folder, architectures=[spelled], model_type="llada")
    assert type(load_model(folder)) is type(model)
    edit(folder, architectures=None, model_type="llada")
    assert type(load_model(folder)) is type(model)
    if family != "llada":  # dense LLaDA cannot be built without its telling field
        fields = json.loads((folder / "config.json").read_text())
        telling = {"lladamoe": ["expert_intermediate_size"], "llada2": ["n_group", "first_k_dense_replace"]}[family]
        assert config_class_for({k: v for k, v in fields.items() if k not in telling}) is None


@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2"])
def test_tensor_names_decide_where_the_configuration_says_nothing(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert type(model_skeleton(tmp_path)) is type(model)


@all_saved("lladamoe", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llada2", "llada")))
def test_several_shards_load_in_a_fresh_process_by_folder_name(saved, tmp_path):
    _, model, _ = saved
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    ids = random_ids(2, 6)
    torch.save(model(ids).logits, tmp_path / "logits.pt")
    code = (
        "import torch, memdlm\n"
        "torch.set_num_threads(1)\n"
        "model = memdlm.load_model('sharded')\n"
        f"logits = model(torch.tensor({ids.tolist()})).logits\n"
        "assert logits.equal(torch.load('logits.pt')), (logits - torch.load('logits.pt')).abs().max()\n"
    )
    done = in_fresh_process(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@every_family
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "auto"])
def test_dtype_and_device_are_those_asked_for(family, dtype, tmp_path):
    tiny(family, torch.float16).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype, device="cpu")
    wanted = torch.float16 if dtype == "auto" else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert not model.training
    assert model.name_or_path == str(tmp_path)


@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2"])
def test_a_skeleton_has_every_shape_and_no_weights(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    skeleton = model_skeleton(tmp_path)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def scribble(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"x" * 32
    file.write_bytes(bytes(content))


def rename(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("up_proj.weight"))
    tensors[name.replace("up_proj", "upper")] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})


def reshape(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("down_proj.weight") or ".ff_out." in name)
    tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@all_saved("llada", "lladamoe", "llada2", "small")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "weights could not be read|the weights .* could not be read"),
        (scribble, "could not be read"),
        (rename, r"missing: .*(up_proj|gate_up_proj).*unexpected: .*upper"),
        (reshape, r"could not be read|of the wrong size: .*\(\d+, \d+\) instead of \(\d+, \d+\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "could not be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
    ids=["cut", "scribbled", "renamed", "reshaped", "gone", "broken json", "list", "no config"],
)
def test_a_damaged_folder_is_refused_with_the_reason(saved, damage, message):
    _, _, folder = saved
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_a_wrong_family_is_named(tmp_path):
    tiny("lladamoe").save_pretrained(tmp_path / "moe")
    tiny("llada").save_pretrained(tmp_path / "dense")
    (tmp_path / "moe" / "config.json").write_text((tmp_path / "dense" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"do not match the LLaDA family.*look like LLaDA-MoE: correct `arch"):
        load_model(tmp_path / "moe")


def test_what_is_no_masked_language_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nothing")
    for fields, message in [
        ({"model_type": "llada3"}, "model_type 'llada3' are not known. Possible: LLaDA, LLaDA-MoE, LLaDA2"),
        ({"model_type": "vit"}, "vit has no token prediction"),
        ({"model_type": "llama"}, 'llama is autoregressive.*"is_causal": false'),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype: 'float31'.*Did you mean 'float32'"):
        load_model(tmp_path, dtype="float31")


def test_a_hub_name_offline_says_so():
    done = in_fresh_process("import memdlm; memdlm.load_model('nobody/nothing', revision='abc')", HF_HUB_OFFLINE="1")
    assert "CheckpointError: model: 'nobody/nothing'" in done.stderr


def test_a_cached_hub_repository_loads_offline_at_its_revision(tmp_path):
    """The layout of huggingface_hub's cache, made by hand: two revisions of one repository."""
    repo = tmp_path / "hub" / "models--some--model"
    for revision, seed in (("a" * 40, 0), ("b" * 40, 1)):
        tiny("llada", seed=seed).save_pretrained(repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "refs" / "other").write_text("b" * 40)
    code = (
        "import memdlm\n"
        "for revision in (None, 'other', 'b' * 40):\n"
        "    print(memdlm.load_model('some/model', revision=revision).lm_head.weight.double().sum().item())\n"
    )
    done = in_fresh_process(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = [tiny("llada", seed=seed).lm_head.weight.double().sum().item() for seed in (0, 1, 1)]
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected)


# ---- tokenizers


def tokenizer_in(folder, config=None, **changes):
    tokenizer = build_word_tokenizer(["a", "b", "<|mdm_mask|>", "<|eot_id|>", "<|role_end|>"])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    if config is not None:
        config.save_pretrained(folder)
    return tokenizer


def test_dense_llada_gets_its_mask_and_its_chat_template(tmp_path):
    own = tokenizer_in(tmp_path, CONFIGS["llada"]())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.mask_token == "<|mdm_mask|>"
    assert tokenizer.eot_token == "<|eot_id|>"
    assert tokenizer.eot_token_id == own.convert_tokens_to_ids("<|eot_id|>")
    assert len(tokenizer) == len(own)
    turns = [{"role": "user", "content": " hi "}]
    head = tokenizer.bos_token + "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == head
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == head + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    turns.append({"role": "assistant", "content": "yes"})
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert whole == head + "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"


@pytest.mark.parametrize("family", ["lladamoe", "llada2", "small"])
def test_other_families_keep_their_template(family, tmp_path):
    own = tokenizer_in(tmp_path, CONFIGS[family]())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.eot_token == ("<|eot|>" if family == "small" else "<|role_end|>")
    assert tokenizer.bos_token is not None
    assert tokenizer.padding_side == "right"


def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
    build_word_tokenizer(["a"]).save_pretrained(tmp_path)
    CONFIGS["llada"]().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)  # has a mask token of its own
    assert tokenizer.mask_token == "<|mask|>"
    edit_tokenizer(tmp_path, "mask_token")
    with pytest.raises(CheckpointError, match=re.escape("none of <|mdm_mask|>. Load the tokenizer")):
        load_tokenizer(tmp_path)
    edit_tokenizer(tmp_path, "eos_token", "pad_token")
    with pytest.raises(CheckpointError, match="neither an EOS nor a PAD"):
        load_tokenizer(tmp_path)


def edit_tokenizer(folder, *names):
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in fields.items() if key not in names}))


def test_a_mask_token_without_an_embedding_is_refused(tmp_path):
    config = CONFIGS["llada"]()
    config.vocab_size = 4
    tokenizer_in(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"has id \d+, but the model's embedding table has 4 rows"):
        load_tokenizer(tmp_path)


# Memory -------------------------------------------------------------------------------------------------------------


class CPUAllocations(TorchDispatchMode):
    """Sizes, in bytes, of all that operations allocate on the CPU."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage().data_ptr()
            for each in tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor) and each.device.type == "cpu"
        }
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                storage = each.untyped_storage()
                if storage.data_ptr() not in given:
                    self.sizes.append(storage.nbytes())
        return out


@pytest.mark.parametrize("family", ["lladamoe", "llada2", "llada"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_for_a_device_are_not_held_by_the_cpu_first(family, dtype, tmp_path, monkeypatch):
    """The meta device stands for an accelerator: what goes there is stacked and converted there."""
    tiny(family).save_pretrained(tmp_path, max_shard_size="20KB")
    experts = max(each.numel() * 4 for each in tiny(family).parameters())
    model_bytes = sum(each.numel() * 4 for each in tiny(family).parameters())
    for module in ("devices", "loading"):
        monkeypatch.setattr(f"memdlm.models.hub.{module}.check_device", torch.device)
    with CPUAllocations() as here:
        load_model(tmp_path, dtype=dtype)
    with CPUAllocations() as elsewhere:
        model = load_model(tmp_path, dtype=dtype, device="meta")
    assert all(each.is_meta for each in model.parameters())
    # On the CPU the stacks, or what is converted, are allocated there: the counter sees them.
    if dtype == "bfloat16" or family != "llada":
        assert sum(here.sizes) > model_bytes / 4
    assert sum(elsewhere.sizes) < model_bytes / 20
    assert max(elsewhere.sizes, default=0) < experts / 4


def test_reading_leaves_the_environment_as_it_was(tmp_path, monkeypatch):
    tiny("lladamoe").save_pretrained(tmp_path)
    for value in (None, "0"):
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0") if value else monkeypatch.delenv(
            "HF_DEACTIVATE_ASYNC_LOAD", raising=False
        )
        load_model(tmp_path)
        assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == value


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are given back on Linux alone")
def test_pages_of_a_mapped_file_are_given_back_and_other_memory_is_left_alone(tmp_path):
    values = torch.arange(2**20, dtype=torch.float32).view(2, -1)
    save_file({"a": values[0], "b": values[1]}, tmp_path / "x.safetensors")

    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = {name: file.get_slice(name)[...] for name in ("a", "b")}
        total = sum(each.sum() for each in mapped.values())
        before = resident()
        give_back([mapped["a"], values])
        assert before - resident() > 0.9 * values[0].numel() * 4
        assert mapped["a"].equal(values[0])
        assert mapped["b"].equal(values[1])
        assert values.sum() == total or values.sum().isclose(total)
    assert values.view(-1).equal(torch.arange(2**20, dtype=torch.float32))


def test_experts_that_do_not_fit_together_are_refused(tmp_path):
    tiny("lladamoe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for wrong in (tensors[name][:, :-1], tensors[name][:-1], tensors[name][0]):
        save_file({**tensors, name: wrong.contiguous()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="could not be read"):
            load_model(tmp_path)


def test_a_fresh_process_finds_every_family_before_it_has_loaded_a_model(tmp_path):
    """`memdlm train` asks for the configuration first; in this process an earlier test may have registered them all."""
    classes = []
    for name in (*CONFIGS, *A2D):
        model = tiny(name)
        model.save_pretrained(tmp_path / name)
        classes.append(type(model.config).__name__)
    program = (
        "import sys; from memdlm.models.hub.resolution import resolve_config\n"
        "for folder in sys.argv[1:]: print(type(resolve_config(folder)[1]).__name__)"
    )
    words = [sys.executable, "-c", program, *(str(tmp_path / name) for name in (*CONFIGS, *A2D))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == classes
