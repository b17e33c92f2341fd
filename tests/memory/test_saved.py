"""Memories as files: what PEFT and another process read, what is left out, and what is refused."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from memdlm.errors import ConfigError, MemoryFileError
from memdlm.memory import (
    MemoryConfig,
    ParametricMemory,
    delete_memory,
    inspect_memory,
    list_memories,
    read_memory,
)
from memdlm.memory.files.library import rename_memory
from memdlm.models import LoRAOptions, add_outer_lora, load_model, load_outer_adapter, load_tokenizer
from per_expert import PerExpert
from tiny import CONFIGS, MASK, random_ids, rng, tiny
from trees import tree

WEIGHTS, CONFIG, HEADER = "adapter_model.safetensors", "adapter_config.json", "memory.json"
every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
SHAPE = {"inner_rank": 4, "inner_alpha": 8.0, "inner_layer_fraction": 0.5, "inner_lr": 1.0, "prompt_mask_ratio": 0.6}
KINDS = {
    "lora": MemoryConfig(**SHAPE),
    "full": MemoryConfig(inner_adapter_type="full", inner_layer_fraction=0.5, inner_lr=1.0, prompt_mask_ratio=0.6),
    "learned start": MemoryConfig.recall(
        **{name: SHAPE[name] for name in SHAPE if name != "prompt_mask_ratio"}, strides=2
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def relative(a, b):
    is_possible = b > -1e5  # MDLM never predicts its mask
    return ((a - b)[is_possible].norm() / b[is_possible].norm()).item()


def memory_of(model, config=KINDS["lora"], **arguments):
    memory = ParametricMemory(model, config, mask_token_id=MASK, **arguments)
    if memory.learned is not None:  # as after training: both factors of the start matter
        for tensor in memory.learned.parameters():
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=rng(5), dtype=torch.float32).to(tensor)
    return memory


def saved(model, folder, config=KINDS["lora"], text=None, **arguments):
    """Save a memory of `text`; returns (the logits of other ids with the memory open, the memory)."""
    memory = memory_of(model, config, **arguments)
    with memory.write(random_ids(1, 8) if text is None else text), torch.no_grad():
        memory.save(folder)
        return model(random_ids(3, 9, seed=1)).logits, memory


# What reads it ------------------------------------------------------------------------------------------------------


@every_family
@every_kind
@torch.no_grad()
def test_what_was_saved_is_recalled_to_the_bit(family, kind, tmp_path):
    model, ids = tiny(family), random_ids(3, 9, seed=1)
    plain = model(ids).logits
    expected, memory = saved(model, tmp_path / "doc.mem", KINDS[kind])
    assert relative(expected, plain) > 1e-3
    with memory.recall(tmp_path / "doc.mem") as file:
        assert model(ids).logits.equal(expected)
        again = memory.save(tmp_path / "again.mem")
    assert again.pairs.keys() == file.pairs.keys()
    assert model(ids).logits.equal(plain)
    with memory.recall(memory.load(tmp_path / "again.mem")):
        assert model(ids).logits.equal(expected)


@torch.no_grad()
def test_another_process_computes_the_same_logits(tmp_path):
    tiny("lladamoe").save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    expected, _ = saved(model, tmp_path / "doc.mem")
    code = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
from memdlm import ParametricMemory, load_model
from memdlm.memory import read_memory
from tiny import MASK, random_ids
torch.set_num_threads(1)
model = load_model({str(tmp_path / "model")!r})
memory = ParametricMemory(model, read_memory({str(tmp_path / "doc.mem")!r}).reading_config, mask_token_id=MASK)
with memory.recall({str(tmp_path / "doc.mem")!r}), torch.no_grad():
    torch.save(model(random_ids(3, 9, seed=1)).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert torch.load(tmp_path / "logits.pt").equal(expected)


@every_family
@every_kind
@torch.no_grad()
def test_plain_peft_gives_the_same_logits(family, kind, tmp_path):
    model = tiny(family, torch.float64)
    expected, _ = saved(model, tmp_path / "doc.mem", KINDS[kind])
    reference, ids = PerExpert(tiny(family, torch.float64)), random_ids(3, 9, seed=1)
    assert relative(reference(ids), expected) > 1e-3
    wrapped = peft.PeftModel.from_pretrained(reference, tmp_path / "doc.mem", autocast_adapter_dtype=False).eval()
    assert relative(wrapped(ids), expected) < 1e-12
    layers = [module for module in wrapped.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert 2 * len(layers) == len(load_file(tmp_path / "doc.mem" / WEIGHTS)), "PEFT adapts what is in the file alone"


@torch.no_grad()
def test_plain_peft_loads_it_on_the_network_itself(tmp_path):
    expected, _ = saved(tiny("small", torch.float64), tmp_path / "doc.mem")
    wrapped = peft.PeftModel.from_pretrained(
        tiny("small", torch.float64), tmp_path / "doc.mem", autocast_adapter_dtype=False
    )
    assert relative(wrapped(random_ids(3, 9, seed=1)).logits, expected) < 1e-12
    as_adapter = load_outer_adapter(tiny("small", torch.float64), tmp_path / "doc.mem")
    assert relative(as_adapter(random_ids(3, 9, seed=1)).logits, expected) < 1e-12


@torch.no_grad()
def test_a_memory_beside_an_outer_adapter_is_kept_for_both_together(tmp_path):
    model = add_outer_lora(tiny("lladamoe"), LoRAOptions(r=4))
    expected, memory = saved(model, tmp_path / "doc.mem")
    with memory.recall(tmp_path / "doc.mem"):
        assert model(random_ids(3, 9, seed=1)).logits.equal(expected)
    with pytest.raises(MemoryFileError, match="other base weights"):
        memory_of(tiny("lladamoe")).load(tmp_path / "doc.mem")


# Sparse export, rows, learned starts --------------------------------------------------------------------------------


@every_family
def test_experts_that_were_never_routed_to_are_left_out(family, tmp_path):
    model = tiny(family)
    chosen = set()
    for name, module in model.named_modules():
        if type(module).__name__ == "Experts":
            module.register_forward_hook(
                lambda _, inputs, __, name=name: chosen.update((name, e) for e in inputs[1].flatten().tolist())
            )
    memory = memory_of(model)
    with memory.write(random_ids(1, 3)):
        file = memory.save(tmp_path / "doc.mem")
    routed = [layer for layer in file.layers if layer.num_experts is not None]
    for layer in routed:
        block = layer.name.split(".mlp.")[0]
        kept = {e for e, module in enumerate(layer.modules()) if module in file.pairs}
        assert 0 < len(kept) < layer.num_experts
        assert kept <= {e for name, e in chosen if name.startswith(block)}
    summary = inspect_memory(tmp_path / "doc.mem")
    assert (summary.num_left_out > 0) == bool(routed)
    assert summary.num_modules + summary.num_left_out == sum(len(layer.modules()) for layer in file.layers)


def test_of_a_learned_start_no_expert_is_left_out_because_the_start_itself_counts(tmp_path):
    memory = memory_of(tiny("lladamoe"), KINDS["learned start"])
    with memory.write(random_ids(1, 3)):
        file = memory.save(tmp_path / "doc.mem")
    assert len(file.pairs) == sum(len(layer.modules()) for layer in file.layers)
    assert inspect_memory(tmp_path / "doc.mem").has_learned_start


@torch.no_grad()
def test_each_row_is_saved_by_itself(tmp_path):
    model, ids = tiny("lladamoe"), random_ids(3, 9, seed=1)
    memory, texts = memory_of(model), random_ids(2, 8)
    with memory.write(texts) as written:
        both = model(ids[:2]).logits
        for row in range(2):
            file = memory.save(tmp_path / f"{row}.mem", row=row, source=f"text {row}")
            assert file.provenance["tokens"] == 8
            assert file.provenance["write_losses"] == written.losses[:, row].tolist()
        with pytest.raises(ConfigError, match="2 memories are open; say which, from 0 to 1"):
            memory.save(tmp_path / "both.mem")
        with pytest.raises(ConfigError, match="row 2 is not there"):
            memory.save(tmp_path / "both.mem", row=2)
    for row in range(2):
        with memory.recall(tmp_path / f"{row}.mem"):
            assert relative(model(ids[row : row + 1]).logits, both[row : row + 1]) < 1e-5
    assert [each.provenance["source"] for each in list_memories(tmp_path)] == ["text 0", "text 1"]
    whole = memory_of(model, MemoryConfig(per_sample=False, **SHAPE))
    with whole.write(texts):
        assert whole.save(tmp_path / "whole.mem").provenance["tokens"] == 16


def test_a_block_must_be_open_to_save_and_only_one_is(tmp_path):
    memory = memory_of(tiny("small"))
    with pytest.raises(ConfigError, match="no memory is open"):
        memory.save(tmp_path / "doc.mem")
    with memory.write(random_ids(1, 8)):
        memory.save(tmp_path / "doc.mem")
        with pytest.raises(ConfigError, match="open already"), memory.recall(tmp_path / "doc.mem"):
            pass
    with pytest.raises(ConfigError, match="no memory is open"):
        memory.export()


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    saved(tiny("lladamoe"), tmp_path / "doc.mem")
    return tmp_path / "doc.mem"


def refused(folder, message, model=None, config=KINDS["lora"], **arguments):
    memory = memory_of(tiny("lladamoe") if model is None else model, config, **arguments)
    with pytest.raises(MemoryFileError, match=message), memory.recall(folder):
        pass


@torch.no_grad()
def test_another_base_is_refused(folder):
    refused(folder, "another family: LLaDAMoEModelLM '', not SmallDLM", tiny("small"))
    refused(folder, "other base weights: LLaDAMoEModelLM '' with digest", tiny("lladamoe", seed=1))
    changed = tiny("lladamoe")
    changed.model.layers[0].mlp.down_proj.weight[3, 4] += 1e-3
    refused(folder, "other base weights", changed)
    other = tiny("lladamoe")
    other.config.rope_theta = 7.0
    refused(folder, "rope_theta=.*; the model has 7.0", other)


@torch.no_grad()
def test_a_change_after_the_first_recall_is_seen(folder):
    model = tiny("lladamoe")
    memory = memory_of(model)
    with memory.recall(folder):
        pass
    model.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(MemoryFileError, match="other base weights"), memory.recall(folder):
        pass


def test_a_checkpoint_that_was_saved_and_loaded_is_the_same_base(folder, tmp_path):
    tiny("lladamoe").save_pretrained(tmp_path / "model")
    assert memory_of(load_model(tmp_path / "model")).load(folder).rank == 4


def test_sixteen_bits_are_another_base_than_what_they_were_rounded_from_but_not_than_themselves(tmp_path):
    half = tiny("lladamoe", torch.bfloat16)
    saved(half, tmp_path / "half.mem")
    refused(tmp_path / "half.mem", "other base weights")
    assert memory_of(half.float()).load(tmp_path / "half.mem").rank == 4


def test_another_tokenizer_is_refused_if_one_was_given(folder, tmp_path, word_tokenizer):
    tiny("small").save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    saved(tiny("lladamoe"), tmp_path / "words.mem", tokenizer=word_tokenizer)
    memory_of(tiny("lladamoe"), tokenizer=load_tokenizer(tmp_path / "model")).load(tmp_path / "words.mem")
    memory_of(tiny("lladamoe")).load(tmp_path / "words.mem")
    memory_of(tiny("lladamoe"), tokenizer=word_tokenizer).load(folder)
    word_tokenizer.add_tokens(["new"])
    refused(tmp_path / "words.mem", "another tokenizer", tokenizer=word_tokenizer)


def test_other_options_of_reading_are_refused_and_options_of_writing_are_not(folder):
    refused(folder, "mem_inner_rank=4, and is to be read with 8", config=MemoryConfig(**{**SHAPE, "inner_rank": 8}))
    one = MemoryConfig(**SHAPE, inner_target_modules="down_proj")
    refused(folder, r"projections.*they differ in .*gate_proj.*read_memory\(folder\).reading_config", config=one)
    memory_of(tiny("lladamoe"), MemoryConfig(**{**SHAPE, "inner_lr": 7.0}, num_inner_steps=3)).load(folder)
    memory_of(tiny("lladamoe"), read_memory(folder).reading_config).load(folder)


def test_another_learned_start_is_refused(tmp_path):
    _, memory = saved(tiny("small"), tmp_path / "doc.mem", KINDS["learned start"])
    memory.learned.log_rates.data += 1
    with pytest.raises(MemoryFileError, match="another learned start"):
        memory.load(tmp_path / "doc.mem")
    memory_of(tiny("small"), read_memory(tmp_path / "doc.mem").reading_config).load(tmp_path / "doc.mem")


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def rewrite(name, change):
    def damage(folder):
        fields = json.loads((folder / name).read_text())
        change(fields)
        (folder / name).write_text(json.dumps(fields))

    return damage


def renamed(old, new):
    def change(tensors):
        names = [name for name in tensors if old in name]
        assert names
        tensors.update({name.replace(old, new): tensors.pop(name) for name in names})

    return lambda folder: edit(folder, change)


def nudged(tensors):
    next(iter(tensors.values()))[0, 0] += 1e-4


SHARED = "layers.2.shared_expert"
DAMAGES = {
    "truncated": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64]),
        f"{WEIGHTS} could not be read",
    ),
    "a side renamed": (renamed(f"{SHARED}.up_proj.lora_A", f"{SHARED}.up_proj.lora_C"), "only lora_A and lora_B"),
    "a module renamed": (renamed(f"{SHARED}.up_proj", f"{SHARED}.upper_proj"), "upper_proj is none of the adapted"),
    "a module gone": (
        lambda folder: edit(folder, lambda t: [t.pop(name) for name in list(t) if f"{SHARED}.up_proj" in name]),
        f"the tensors of model.{SHARED}.up_proj are missing",
    ),
    "one partner gone": (
        lambda folder: edit(folder, lambda t: t.pop(next(name for name in t if "lora_A" in name))),
        "lora_A without lora_B",
    ),
    "a value changed": (lambda folder: edit(folder, nudged), f"{WEIGHTS} is not what was saved"),
    "another scale": (rewrite(CONFIG, lambda f: f.update(lora_alpha=9)), "says a scale of 2.25, memory.json one of 2"),
    "another rank": (rewrite(CONFIG, lambda f: f.update(r=2, lora_alpha=4)), r"has shape \(4, .*\), not \(2, "),
    "another PEFT option": (rewrite(CONFIG, lambda f: f.update(revision="x")), f"{CONFIG} is not what was saved"),
    "another base in the header": (
        rewrite(HEADER, lambda f: f["fingerprint"].update(weights="0" * 64)),
        f"{HEADER} is not what was saved",
    ),
    "an unknown option": (rewrite(HEADER, lambda f: f["config"].update(inner_rnk=4)), "Did you mean 'inner_rank'"),
    "a field gone": (rewrite(HEADER, lambda f: f.pop("provenance")), "does not say what a memory needs"),
    "of the future": (rewrite(HEADER, lambda f: f.update(format=2)), "has format 2; this version reads 1"),
    "no checksums": (rewrite(HEADER, lambda f: f.pop("sha256")), "lacks the checksums"),
    "no JSON": (lambda folder: (folder / HEADER).write_text("{"), f"{HEADER} could not be read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "there is no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_the_reason(damage, folder):
    act, message = DAMAGES[damage]
    act(folder)
    refused(folder, message)


# Folders ------------------------------------------------------------------------------------------------------------


def test_memories_are_listed_and_deleted_and_nothing_else_is(folder, tmp_path):
    saved(tiny("small"), tmp_path / "small.mem")
    (folder / WEIGHTS).write_bytes(b"")
    (tmp_path / "other").mkdir()
    first, second = list_memories(tmp_path)
    assert first.problem is not None
    assert WEIGHTS in first.problem
    assert (second.problem, second.family, second.provenance["tokens"]) == (None, "SmallDLM", 8)
    delete_memory(folder)
    for path in (tmp_path / "other", tmp_path):
        with pytest.raises(MemoryFileError, match="Nothing was deleted"):
            delete_memory(path)
    (tmp_path / "small.mem" / "notes.txt").write_text("mine")
    with pytest.raises(MemoryFileError, match=r"more than a memory \(notes.txt\)"):
        delete_memory(tmp_path / "small.mem")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["other", "small.mem"]
    with pytest.raises(MemoryFileError, match="no folder"):
        list_memories(tmp_path / "none")


def test_a_link_to_a_memory_is_neither_deleted_nor_renamed(folder, tmp_path):
    for target in (folder.name, tmp_path / folder.name):
        link = tmp_path / "alias.mem"
        link.symlink_to(target)
        before = tree(folder)
        with pytest.raises(MemoryFileError, match=r"is a link to .*Nothing was deleted; name the memory"):
            delete_memory(link)
        with pytest.raises(MemoryFileError, match=r"is a link to .*Nothing was renamed"):
            rename_memory(link, tmp_path / "new.mem")
        assert tree(folder) == before
        assert link.is_symlink()
        link.unlink()


def test_a_memory_replaces_a_memory_and_nothing_else(tmp_path, monkeypatch):
    _, memory = saved(tiny("small"), tmp_path / "doc.mem")
    first = (tmp_path / "doc.mem" / WEIGHTS).read_bytes()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with memory.write(random_ids(1, 8, seed=9)):
        with pytest.raises(ConfigError, match=r"did not write thesis\.tex there"):
            memory.save(tmp_path / "precious")
        with monkeypatch.context() as patch:
            patch.setattr(
                "memdlm.memory.files.saved.write_adapter", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
            )
            with pytest.raises(OSError, match="disk full"):
                memory.save(tmp_path / "doc.mem")
        assert (tmp_path / "doc.mem" / WEIGHTS).read_bytes() == first
        memory.save(tmp_path / "doc.mem")
    assert (tmp_path / "doc.mem" / WEIGHTS).read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc.mem", "precious"]
