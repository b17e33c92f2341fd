"""Interrupted and resumed is uninterrupted, and the best is what is left, for every kind of run, to the bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from memdlm.models import load_model
from memdlm.models.hub.loading import load_weights
from run_kinds import MEMORY, TRAINED, is_same, losses, new_model, state, trainer_of
from tiny import MASK
from tiny_foreign import FOREIGN

FAMILIES = ("llada", "lladamoe", "llada2")
KINDS = [(family, trained, memory) for family in FAMILIES for trained in TRAINED for memory in MEMORY]
KINDS += [
    ("small", "full", "learned"),
    ("llada_switches", "full", "on"),
    ("bert", "full", "off"),
    ("bert", "LoRA", "off"),
]
# Dream shares its network with SDAR; together they meet every kind of training and of memory.
KINDS += [("dream", "full", "learned"), ("sdar", "LoRA", "on"), ("dream", "QLoRA", "on")]
KINDS += [("llada", "full", "contexts"), ("lladamoe", "LoRA", "contexts"), ("llada2", "QLoRA", "contexts")]
KINDS += [("a decoder with stacked experts", "full", "off")]


def model_of(folder, family, trained, seed=0):
    if trained == "QLoRA":
        pytest.importorskip("bitsandbytes")
    base = folder / f"base-{family}"
    if family in FOREIGN and not base.exists():
        FOREIGN[family]().save_pretrained(base)
    return new_model(folder, family, trained, seed)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize(("family", "trained", "memory"), KINDS, ids=[" ".join(kind) for kind in KINDS])
def test_a_resumed_run_is_the_uninterrupted_one(family, trained, memory, bases, tmp_path):
    whole = trainer_of(model_of(bases, family, trained), tmp_path / "whole", memory)
    base = state(whole)
    whole.train()
    again = trainer_of(model_of(bases, family, trained, seed=7), tmp_path / "again", memory, seed=whole.args.seed)
    fresh = state(again)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    again.train(resume_from_checkpoint=str(checkpoint))
    expected = state(whole)
    assert is_same(state(again), expected)
    assert losses(again) == losses(whole)
    # It can fail: a run that had loaded nothing would begin elsewhere, and an optimizer step moves everything.
    moved = [name for name in expected if not expected[name].equal(base[name]) and expected[name].is_floating_point()]
    part = {"full": "experts" if "experts" in "".join(expected) else "weight"}.get(trained, "lora_")
    assert any(part in name for name in moved)
    assert trained == "full" or not is_same(fresh, base), "the adapter of the resumed run began elsewhere"
    if memory in ("learned", "contexts"):
        assert any(name.startswith("memory.") for name in moved)


class Best(TrainerCallback):
    """Makes step 2 the best."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = {1: 1.0, 2: 5.0, 3: 2.0}[state.global_step]


@pytest.mark.parametrize(("family", "trained", "memory"), KINDS, ids=[" ".join(kind) for kind in KINDS])
def test_what_is_left_is_the_best_checkpoint(family, trained, memory, bases, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    more |= {"metric_for_best_model": "score", "greater_is_better": True}
    trainer = trainer_of(model_of(bases, family, trained), tmp_path / "run", memory, **more)
    trainer.add_callback(Best())
    trainer.train()
    trainer.save_final(tmp_path / "final")
    left = files(tmp_path / "final")
    best, last = (files(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 3))
    assert left.keys() >= {"adapter_model.safetensors" if trained != "full" else "model.safetensors"}
    assert left == best
    assert left != last
    assert ("memory_init.safetensors" in left) == (memory in ("learned", "contexts"))


def files(folder):
    """Every tensor's dtype, shape and bits; the order of a file's metadata means nothing."""
    return {
        path.name: {
            name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist())
            for name, tensor in load_file(path).items()
        }
        for path in folder.glob("*.safetensors")
    }


def test_the_best_is_found_where_its_folder_is_now(bases, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 3}
    more |= {"metric_for_best_model": "score", "greater_is_better": True}
    first = trainer_of(model_of(bases, "llada", "full"), tmp_path / "run", **more)
    first.add_callback(Best())
    first.train()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = trainer_of(model_of(bases, "llada", "full"), tmp_path / "moved", **more)
    again.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-3"))
    expected = load_model(tmp_path / "moved" / "checkpoint-2").state_dict()
    assert is_same(dict(again.model.state_dict()), expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_is_done_is_not_trained_further(steps, bases, tmp_path):
    """Three steps are an epoch: the end need not be an epoch's."""
    whole, again = (
        trainer_of(model_of(bases, "llada", "full"), tmp_path / name, max_steps=steps, lr_scheduler_type="constant")
        for name in ("whole", "again")
    )
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    assert again.state.global_step == steps
    assert is_same(state(again), state(whole))


def test_a_dtype_below_single_precision_is_kept(bases, tmp_path):
    def model():
        return model_of(bases, "lladamoe", "full").to(torch.bfloat16)

    whole, again = (trainer_of(model(), tmp_path / name, learning_rate=0.05) for name in ("whole", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert is_same(state(again), state(whole))
    assert not is_same(state(whole), dict(model().state_dict()))


def test_what_a_run_leaves_is_what_a_new_model_reads(bases, tmp_path):
    trainer = trainer_of(model_of(bases, "llada2", "full"), tmp_path / "run")
    trainer.train()
    trainer.save_final(tmp_path / "final")
    other = model_of(bases, "llada2", "full")
    load_weights(other, tmp_path / "final")
    assert is_same(dict(other.state_dict()), dict(trainer.model.state_dict()))
    assert is_same(dict(load_model(tmp_path / "final").state_dict()), dict(other.state_dict()))
    assert trainer.mask_token_id == MASK
