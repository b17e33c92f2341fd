"""Outer LoRA: published per-expert adapters on stacked experts and back, training, merging, refusals."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from memdlm.cli.main import main
from memdlm.errors import CheckpointError, ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LoRAOptions, add_outer_lora, load_model, load_outer_adapter, merge_outer_adapter
from memdlm.models.blocks.experts import grouped_linear
from memdlm.models.lora import experts as expert_lora
from memdlm.models.lora.adapters import _shortest_patterns, adapter_config, find_targets
from per_expert import PerExpert
from tiny import CONFIGS, MASK, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@torch.no_grad()
def randomise(model, seed=1):
    """Give every adapter weight a value that matters, in an order that names alone determine."""
    generator = rng(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)


def adapted(family, dtype=torch.float32, **options):
    model = tiny(family, dtype)
    add_outer_lora(model, LoRAOptions(**{"r": 4, **options}))
    randomise(model)
    return model


def published(family, folder, dtype=torch.float32, **config):
    """Train-like adapter made by PEFT alone on one linear layer per expert; returns the wrapped reference."""
    reference = PerExpert(tiny(family, dtype))
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "exclude_modules": [reference.head], **config}
    wrapped = peft.get_peft_model(reference, peft.LoraConfig(**config)).eval()
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped


def relative(a, b):
    is_possible = b > -1e5  # MDLM never predicts its mask
    return ((a - b)[is_possible].norm() / b[is_possible].norm()).item()


# Published layout ---------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"target_modules": ["up_proj", "q_proj", "dense", "attn_out"]}], ids=str
)
@torch.no_grad()
def test_a_published_adapter_gives_the_logits_peft_gives(family, dtype, config, tmp_path):
    reference, ids = published(family, tmp_path, dtype, **config), random_ids(2, 9)
    base = tiny(family, dtype)
    plain, expected = base(ids).logits, reference(ids)
    assert relative(plain, expected) > 0.01
    model = load_outer_adapter(base, tmp_path)
    assert relative(model(ids).logits, expected) < TOLERANCE[dtype]


@every_family
@pytest.mark.parametrize("targets", ["all-linear", "up_proj,attn_out", "down_proj,q_proj,query_key_value"])
@torch.no_grad()
def test_peft_gives_the_logits_of_an_adapter_that_was_saved_here(family, targets, tmp_path):
    names = {name.rpartition(".")[2] for name in find_targets(tiny(family))} | {"down_proj"}
    targets = ",".join(each for each in targets.split(",") if each in names | {"all-linear"})
    model, ids = adapted(family, torch.float64, target_modules=targets), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS] or sorted(
        path.name for path in tmp_path.iterdir()
    ) == [CONFIG, WEIGHTS]
    reference = PerExpert(tiny(family, torch.float64))
    wrapped = peft.PeftModel.from_pretrained(reference, tmp_path, autocast_adapter_dtype=False).eval()
    layers = [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert 2 * len(layers) == len(load_file(tmp_path / WEIGHTS))
    assert relative(wrapped(ids), model(ids).logits) < 1e-12


@every_family
def test_loading_and_saving_keeps_every_name_and_bit(family, tmp_path):
    published(family, tmp_path / "theirs")
    load_outer_adapter(tiny(family), tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    assert all(theirs[name].equal(ours[name]) for name in theirs)
    configs = [json.loads((tmp_path / side / CONFIG).read_text()) for side in ("theirs", "ours")]
    for field in ("r", "lora_alpha", "lora_dropout", "peft_type", "use_rslora"):
        assert configs[0][field] == configs[1][field]
    assert set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])


def test_names_in_the_file_are_one_per_expert(tmp_path):
    adapted("lladamoe").save_pretrained(tmp_path)
    names = set(load_file(tmp_path / WEIGHTS))
    for module in ("mlp.experts.5.gate_proj", "mlp.gate", "shared_expert.down_proj", "self_attn.q_proj"):
        assert f"base_model.model.model.layers.1.{module}.lora_A.weight" in names
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight" in names
    assert not any("lm_head" in name or "adapter" in name for name in names)


def test_patterns_match_what_was_chosen_and_nothing_else():
    head, blocks = "model.transformer.ff_out", [f"model.transformer.blocks.{i}.ff_out" for i in range(2)]
    assert _shortest_patterns(blocks, [head]) == ["0.ff_out", "1.ff_out"]
    assert _shortest_patterns(["a.x", "b.x"], ["a.y"]) == ["x"]
    assert _shortest_patterns(["x"], ["a.x"]) == ["x"]


@torch.no_grad()
def test_an_adapter_of_the_output_projection_loads_unless_that_is_tied(tmp_path):
    targets = {"target_modules": ["lm_head", "up_proj"], "exclude_modules": None}
    reference, ids = published("lladamoe", tmp_path, torch.float64, **targets), random_ids(2, 9)
    model = load_outer_adapter(tiny("lladamoe", torch.float64), tmp_path)
    assert relative(model(ids).logits, reference(ids)) < 1e-12
    assert relative(merge_outer_adapter(model)(ids).logits, reference(ids)) < 1e-12
    tied = tiny("lladamoe", torch.float64)
    tied.config.tie_word_embeddings = True
    with pytest.raises(CheckpointError, match="no linear layer for lm_head"):
        load_outer_adapter(tied, tmp_path)


# Starting, training -------------------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone(family):
    ids = random_ids(2, 7)
    before = torch.get_rng_state()
    first, again, other = (add_outer_lora(tiny(family), LoRAOptions(r=4), seed=seed) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    # Adding zeros makes a copy, and activations of copies may be rounded by other instructions.
    assert relative(first(ids).logits, tiny(family)(ids).logits) < 1e-6
    learned = [
        {name: value for name, value in model.named_parameters() if value.requires_grad}
        for model in (first, again, other)
    ]
    assert learned[0].keys() == learned[1].keys()
    assert all("lora_" in name for name in learned[0])
    assert all(learned[0][name].equal(learned[1][name]) for name in learned[0])
    assert not any(value.equal(learned[2][name]) for name, value in learned[0].items() if value.any())
    assert sum(value.any().item() for value in learned[0].values()) == len(learned[0]) // 2


@every_family
@pytest.mark.parametrize("four_bit", [False, True], ids=["full", "4-bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_memory_open_changes_the_adapter_alone(family, four_bit, checkpointing, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    model = add_outer_lora(load_model(tmp_path, load_in_4bit=four_bit), LoRAOptions(r=4))
    randomise(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    memory = ParametricMemory(model, MemoryConfig(inner_layer_fraction=0.5), mask_token_id=MASK)
    ids = random_ids(2, 24)
    with memory.write(ids) as written:
        model(ids).logits.square().mean().backward()
    assert (written.grad_norms > 0).all()
    optimizer.step()
    for name, value in model.state_dict().items():
        if "lora_" in name:
            assert not value.equal(before[name]), name
        else:
            assert value.equal(before[name]), name


@pytest.mark.parametrize("family", ["lladamoe", "small"])
def test_gradients_of_stacked_adapters_equal_those_of_peft(family, tmp_path):
    reference, ids = published(family, tmp_path, torch.float64), random_ids(2, 9)
    model = load_outer_adapter(tiny(family, torch.float64), tmp_path)
    reference(ids).square().mean().backward()
    model(ids).logits.square().mean().backward()
    theirs = {
        name.replace(".default", "").removeprefix("base_model.model."): p.grad
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    compared = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".adapter.lora_" in name:
            path, _, side = name.partition(".adapter.")
            side, projection = side.split(".")
            for e, gradient in enumerate(parameter.grad):
                expected = theirs[f"{path}.{e}.{projection}.{side}.weight"]
                if expected is None:
                    assert not gradient.any()
                else:
                    assert_close(gradient, expected)
                    compared += 1
        else:
            assert_close(parameter.grad, theirs[name.replace(".default", "")])
            compared += 1
    assert compared > 20


def test_dropout_acts_in_training_only():
    model, ids = adapted("lladamoe", lora_dropout=0.5), random_ids(2, 9)
    assert model(ids).logits.equal(model(ids).logits)
    model.train()
    assert not model(ids).logits.equal(model(ids).logits)
    adapter = model.model.layers[1].mlp.experts.adapter
    assert adapter.dropout.p == 0.5
    assert adapter.dropout.training


@torch.no_grad()
def test_adapters_of_a_bf16_base_are_float32_and_its_output_stays_bf16():
    model = adapted("lladamoe", torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert model(random_ids(2, 9)).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model(random_ids(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_experts_compute_in_its_dtype(dtype, monkeypatch):
    """The grouped product must know the dtype: its alignment, and whether there is one, depend on it."""
    model, ids, seen = adapted("lladamoe", lora_alpha=64), random_ids(2, 9), []
    plain = model(ids).logits

    def watched(x, weight, ends):
        seen.append((x.dtype, weight.dtype))
        return grouped_linear(x, weight, ends)

    monkeypatch.setattr(expert_lora, "grouped_linear", watched)
    model(ids)
    assert set(seen) == {(torch.float32, torch.float32)}
    seen.clear()
    with torch.autocast("cpu", dtype):
        logits = model(ids).logits
    assert set(seen) == {(dtype, dtype)}
    assert 0 < relative(logits.float(), plain) < 0.05


# Loading by name, merging -------------------------------------------------------------------------------------------


@pytest.fixture
def base_and_adapter(tmp_path):
    tiny("lladamoe").save_pretrained(tmp_path / "base")
    model = add_outer_lora(load_model(tmp_path / "base"), LoRAOptions(r=4))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


@torch.no_grad()
def test_an_adapter_names_its_base_and_may_be_put_on_another(base_and_adapter):
    folder, model = base_and_adapter
    ids = random_ids(2, 9)
    assert load_model(folder / "adapter")(ids).logits.equal(model(ids).logits)
    shutil.move(folder / "base", folder / "moved")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(folder / "adapter")
    assert load_model(folder / "moved", adapter=folder / "adapter")(ids).logits.equal(model(ids).logits)


@every_family
@pytest.mark.parametrize("use_rslora", [False, True])
@torch.no_grad()
def test_merged_weights_do_what_the_adapter_did(family, use_rslora):
    model, ids = adapted(family, torch.float64, use_rslora=use_rslora), random_ids(2, 9)
    expected, names = model(ids).logits, set(tiny(family).state_dict())
    merge_outer_adapter(model)
    assert relative(model(ids).logits, expected) < 1e-12
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert adapter_config(model) is None


def test_merging_rounds_once(tmp_path):
    exact = adapted("lladamoe", torch.float64)
    model = tiny("lladamoe", torch.bfloat16)
    base = tiny("lladamoe", torch.bfloat16).double()
    exact.save_pretrained(tmp_path)
    merge_outer_adapter(load_outer_adapter(model, tmp_path))
    merge_outer_adapter(load_outer_adapter(base, tmp_path))
    for name, value in base.state_dict().items():
        difference = (model.state_dict()[name].double() - value).abs()
        assert (difference <= value.abs() * 2**-8 + 1e-6).all(), name


@torch.no_grad()
def test_the_merge_command_writes_a_model_that_loads(base_and_adapter, word_tokenizer, capsys):
    folder, model = base_and_adapter
    word_tokenizer.save_pretrained(folder / "base")
    arguments = ["merge", "--adapter", str(folder / "adapter"), "--output", str(folder / "out")]
    assert main([*arguments, "--dtype", "float32"]) == 0
    ids = random_ids(2, 9)
    merged = load_model(folder / "out")
    assert relative(merged(ids).logits, model(ids).logits) < 1e-5
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in load_file(folder / "out" / "model.safetensors")
    assert (folder / "out" / "tokenizer_config.json").is_file()
    assert main(arguments) == 2
    assert "name a new folder, or add --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert load_model(folder / "out").dtype == torch.bfloat16
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_merging_what_is_incomplete_is_refused_and_writes_nothing(part, tmp_path, capsys):
    tiny("lladamoe").save_pretrained(tmp_path / "base")
    add_outer_lora(load_model(tmp_path / "base"), LoRAOptions(r=2)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / part / ("model.safetensors" if part == "base" else WEIGHTS)
    tensors = load_file(file)
    gone = [name for name in tensors if "layers.2.self_attn.o_proj" in name]
    save_file({name: value for name, value in tensors.items() if name not in gone}, file, metadata={"format": "pt"})
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 2
    assert "model.layers.2.self_attn.o_proj" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# Refusals -----------------------------------------------------------------------------------------------------------


def edit(folder, change):
    file = folder / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


EXPERT = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"
DAMAGES = {
    "a key that is none": (
        lambda t: t.update({"base_model.model.score.weight": t.pop(EXPERT)}),
        "not base_model.model.score",
    ),
    "no partner": (lambda t: t.pop(EXPERT), "without lora_B, or the reverse: model.layers.1.mlp.experts.2.up_proj"),
    "no such expert": (
        lambda t: t.update(
            {name.replace("experts.2.up", "experts.99.up"): t.pop(name) for name in list(t) if "experts.2.up" in name}
        ),
        "no linear layer for model.layers.1.mlp.experts.99.up_proj",
    ),
    "an expert left out": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.experts.2.up" in name],
        "the tensors of model.layers.1.mlp.experts.2.up_proj are missing",
    ),
    "a linear layer left out": (
        lambda t: [t.pop(name) for name in list(t) if "layers.2.self_attn.q_proj" in name],
        "the tensors of model.layers.2.self_attn.q_proj are missing",
    ),
    "another rank": (
        lambda t: t.update({EXPERT: t[EXPERT][:2].clone()}),
        r"up_proj.lora_A \(2, 32\) instead of \(4, 32\)",
    ),
    "another width": (lambda t: t.update({EXPERT: t[EXPERT][:, :8].clone()}), r"\(4, 8\) instead of \(4, 32\)"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_file_that_does_not_fit_is_refused_with_the_names(damage, tmp_path):
    adapted("lladamoe").save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_outer_adapter(tiny("lladamoe"), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("of_the_future", 3),
    ],
)
def test_an_adapter_of_another_kind_is_refused(field, value, tmp_path):
    adapted("small").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, field: value}))
    with pytest.raises(CheckpointError, match=field):
        load_outer_adapter(tiny("small"), tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"has no {CONFIG}"):
        load_outer_adapter(tiny("small"), tmp_path)
    adapted("small").save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} could not be read"):
        load_outer_adapter(tiny("small"), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=f"{CONFIG} could not be read"):
        load_outer_adapter(tiny("small"), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="names no base_model_name_or_path"):
        load_model(tmp_path)


def test_options_that_cannot_be_honoured_are_refused():
    with pytest.raises(ConfigError, match="use_dora=True is not supported"):
        LoRAOptions(use_dora=True)
    with pytest.raises(ConfigError, match="modules_to_save='lm_head' is not supported"):
        LoRAOptions(modules_to_save="lm_head")
    with pytest.raises(ConfigError, match="r must be at least 1"):
        LoRAOptions(r=0)
    with pytest.raises(ConfigError, match=r"'up_prj' is no projection.*Did you mean 'up_proj'"):
        add_outer_lora(tiny("lladamoe"), LoRAOptions(target_modules="up_prj"))
    with pytest.raises(ConfigError, match="has an outer adapter already"):
        add_outer_lora(adapted("small"))
    with pytest.raises(ConfigError, match="has an outer adapter already"):
        load_outer_adapter(adapted("small"), "anything")
    with pytest.raises(ConfigError, match="no outer adapter to merge"):
        merge_outer_adapter(tiny("small"))
