"""Whatever the Python API is given: it works or raises a MemDLMError, and the model stays what it was."""

import math
import random
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import memdlm
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import MemDLMError
from memdlm.inference import PromptCache
from memdlm.memory import average, compress, concatenate
from memdlm.models import BlockCausal, Full
from tiny import V, random_ids, rng, tiny

WORDS = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
MASK = WORDS.mask_token_id
IDS = random_ids(2, 6)
FAMILIES = ("llada", "lladamoe", "llada2", "small")
STRANGE = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        10**9,
        10**30,
        0.5,
        -2.5,
        math.nan,
        math.inf,
        "",
        "w01",
        "\ud800",
        b"w01",
        "no/such",
    ),
    *(
        [],
        [[]],
        [None],
        [1],
        [1, 2],
        [1.5],
        [True],
        ["w01"],
        ["w01", ""],
        [[1, 2], [3]],
        {},
        {"a": 1},
        {1},
        object(),
        ...,
    ),
    *(
        ["w01"] * 2,
        [[-1]],
        [[10**9]],
        [[10**30]],
        [[MASK, 1]],
        ["\ud800"],
        [[{}]],
        [[{"role": "user"}]],
        [[{"role": 1}]],
    ),
    *([[{"role": "user", "content": None}]], [[{"role": "user", "content": "w01"}]], [[["w01"]]]),
    *(IDS, IDS[0], IDS[:, :0], IDS[:0], IDS.float(), IDS.int(), IDS.bool(), IDS - 99, IDS + 10**6, IDS[None]),
    *(torch.tensor(1), torch.tensor([]), IDS.to("meta"), torch.ones(2, 6, 6), torch.full((2, 6), math.nan)),
    *(rng(), [rng()], [rng(), rng()], [1, 2], Full(), BlockCausal(4), Path("/no/such"), torch.nn.Linear(2, 2), MASK, V),
]
GOOD = {
    "prompts": [["w01 w02"], [[3, 4, 5], [6]], IDS, ["w01", [3]]],
    "sequences": [[[3, MASK, 4]], [f"w01 {WORDS.mask_token} w02"]],
    "input_ids": [IDS, IDS[:1]],
}


class World:
    """A model, what belongs to it, and what it computes."""

    def __init__(self, family, folder):
        self.model, self.folder = tiny(family), folder
        self.options = memdlm.MemoryConfig(inner_layer_fraction=0.4, inner_rank=4, inner_alpha=8.0)
        self.memory = memdlm.ParametricMemory(self.model, self.options, mask_token_id=MASK)
        self.config = memdlm.GenerationConfig(max_new_tokens=2)
        with self.memory.write(IDS[:1]):
            self.saved = self.memory.save(folder / "good.mem")
        self.parameters = [parameter.clone() for parameter in self.model.parameters()]
        self.logits = self.of_model()

    def of_model(self):
        with torch.no_grad():
            return self.model(IDS).logits

    def check(self):
        assert self.of_model().equal(self.logits)
        assert all(a.equal(b) for a, b in zip(self.parameters, self.model.parameters(), strict=True))
        for module in self.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in vars(module)
        with self.memory.write(IDS[:1]) as written:
            assert written.losses.isfinite().all()


def written(memory, **arguments):
    with memory.write(**arguments) as result:
        return result


def saved(world, folder, row, **provenance):
    with world.memory.write(IDS):
        return world.memory.save(folder, row=row, **provenance)


def recalled(world, memory):
    with world.memory.recall(memory):
        return world.of_model()


def chosen(world, rows):
    with world.memory.write(IDS), world.memory.of_rows(rows):
        return world.of_model()


def calls(world):
    """name -> (call, good arguments). The fuzzer replaces one or two of them by something strange."""
    model, memory, config = world.model, world.memory, world.config
    decoding = {"model": model, "tokenizer": WORDS, "config": config, "memory": memory, "generator": None}
    decoding |= {"attention_pattern": None}
    cache = PromptCache(model, memory) if type(model).__name__.startswith("LLaDA2") else None
    return {
        "generate": (memdlm.generate, {**decoding, "prompts": ["w01 w02"], "prompt_cache": cache}),
        "stream": (lambda **a: list(memdlm.stream(**a)), {**decoding, "prompts": ["w01 w02"]}),
        "infill": (memdlm.infill, {**decoding, "sequences": [[3, MASK, 4]]}),
        "score": (
            memdlm.score,
            {
                "model": model,
                "prompt_ids": IDS[0],
                "target_ids": IDS[1],
                "num_samples": 2,
                "memory": memory,
                "generator": rng(),
            }
            | {"mask_token_id": MASK, "batch_size": 2, "attention_pattern": None},
        ),
        "write": (
            lambda **a: written(memory, **a),
            {
                "input_ids": IDS,
                "labels": None,
                "attention_mask": None,
                "generator": None,
                "is_padding": None,
                "anchor": None,
            }
            | {"attention_pattern": None},
        ),
        "memory": (
            memdlm.ParametricMemory,
            {
                "model": model,
                "config": None,
                "mask_token_id": MASK,
                "schedule": None,
                "attention_pattern": None,
                "tokenizer": WORDS,
            }
            | {"right_shift_logits": False},
        ),
        "save": (
            lambda **a: saved(world, **a),
            {"folder": world.folder / "new.mem", "row": 0, "note": "x", "tokens": 1},
        ),
        "recall": (lambda **a: recalled(world, **a), {"memory": world.folder / "good.mem"}),
        "load": (memory.load, {"folder": world.folder / "good.mem"}),
        "of_rows": (lambda **a: chosen(world, **a), {"rows": torch.tensor([0])}),
        "concatenate": (concatenate, {"memories": [world.saved], "weights": [1.0], "start": None}),
        "average": (average, {"memories": [world.saved]}),
        "compress": (compress, {"memory": world.saved, "rank": 2}),
        "model": (
            model,
            {
                "input_ids": IDS,
                "attention_mask": None,
                "attention_pattern": None,
                "positions": None,
                "position_ids": None,
            },
        ),
        "GenerationConfig": (memdlm.GenerationConfig, vars(config)),
        "MemoryConfig": (memdlm.MemoryConfig, vars(world.options)),
        "load_model": (
            memdlm.load_model,
            {"name_or_path": "no/such", "dtype": "auto", "device": None, "adapter": None},
        ),
        "load_tokenizer": (memdlm.load_tokenizer, {"name_or_path": "no/such"}),
    }


def fuzz(family, folder, count, seed):
    world, random_of = World(family, folder), random.Random(f"{family} {seed}")
    table, failed = calls(world), 0
    for turn in range(count):
        name = random_of.choice([*table, "generate", "write", "model"])
        call, arguments = table[name]
        arguments = dict(arguments)
        for place in random_of.sample([*arguments], random_of.choice([0, 1, 1, 1, 2]) if len(arguments) > 1 else 1):
            strange = [*STRANGE, *GOOD.get(place, []), *GOOD.get(place, [])]
            arguments[place] = random_of.choice(strange)
        said = f"{family}, seed {seed}, turn {turn}: {name}({arguments!r:.300})"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(**arguments)
        except MemDLMError as error:
            failed += 1
            lines = len(str(error).splitlines())
        except Exception as error:
            raise AssertionError(said) from error
        else:
            lines = 1
        assert lines == 1, said
        world.check()
    return failed


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    # The environment is read when the hub's package is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("family", FAMILIES)
def test_a_strange_call_raises_our_errors_and_leaves_no_trace(family, tmp_path):
    assert fuzz(family, tmp_path, 40, seed=0) > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("family", FAMILIES)
def test_many_strange_calls_raise_our_errors_and_leave_no_trace(family, seed, tmp_path):
    assert fuzz(family, tmp_path, 500, seed=seed) > 100
