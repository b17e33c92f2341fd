"""Rows without a context beside rows that have one: they are trained, and judged, as without memory."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

import run_kinds
from memdlm.cli.main import main
from memdlm.data import Collator, EncodingOptions, load_conversations
from memdlm.data.encoding import check_contexts, context_lengths, encode_all, fit
from memdlm.data.preprocess import load_preprocessed, preprocess
from memdlm.diffusion import Corrupted, Linear
from memdlm.errors import ConfigError, DataError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.randomness import derive
from memdlm.training import Batch, memory_of, score
from memdlm.training.tracking import NO_MEMORY, row_columns, row_metrics
from memdlm.types import IGNORE_INDEX
from tiny import MASK, PAD, families, random_ids, rng, saved_with_words, tiny

SIZE = {"write_source": "context", "inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0}
LEARNED = MemoryConfig.recall(**SIZE, strides=2)
PLAIN = MemoryConfig(**SIZE, per_sample=True)
MEMORIES = {
    "learned": LEARNED,
    "LoRA": PLAIN,
    "full": MemoryConfig(
        write_source="context", inner_layer_fraction=0.5, inner_adapter_type="full", inner_lr=0.1, per_sample=True
    ),
}
CONTEXTS = [random_ids(1, 9)[0].tolist(), [], random_ids(1, 5, seed=1)[0].tolist(), []]
WORDS = [{"prompt": "w1 w2", "response": "w3", "document": "w4 w1 w5"}, {"prompt": "w2", "response": "w3 w4"}]


@pytest.fixture(autouse=True)
def _own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))


@pytest.fixture
def network(tmp_path):
    return saved_with_words("small", tmp_path / "model")


def feature(row, contexts=CONTEXTS):
    ids = random_ids(4, 8)[row].tolist()
    return {"input_ids": ids, "labels": [-100] * 3 + ids[3:], "context_ids": contexts[row]}


def batch_of(rows=(0, 1, 2, 3), contexts=CONTEXTS):
    rows = list(rows)
    given = Collator(PAD)([feature(row, contexts) for row in rows])
    is_maskable = given["labels"] != IGNORE_INDEX
    is_masked = is_maskable & (torch.rand(4, 8, generator=rng(7))[rows] < 0.7)
    t = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)[rows]
    return Batch(
        clean=given["input_ids"],
        labels=given["labels"],
        attention_mask=None,
        is_padding=given["is_padding"],
        is_maskable=is_maskable,
        noised=Corrupted(given["input_ids"].masked_fill(is_masked, MASK), is_masked, t),
        context=given["context_ids"],
        is_context=given["is_context"],
    )


def opened(memory, batch, **options):
    keys = [derive("row", row) for row in range(len(batch.clean))]
    return memory_of(memory, batch, pad_token_id=PAD, randomness=keys, **options)


def memory_on(family, config, dtype=torch.float64):
    return ParametricMemory(tiny(family, dtype), config, mask_token_id=MASK)


# Reading ------------------------------------------------------------------------------------------------------------


@families("llada_switches", "small_windowed", "sdar", "mdlm")
@pytest.mark.parametrize("kind", list(MEMORIES))
def test_bare_rows_read_no_memory_and_others_their_own(kind, family):
    memory, batch = memory_on(family, MEMORIES[kind]), batch_of()
    ids, model = batch.noised.ids, memory.model
    without = model(ids).logits
    with opened(memory, batch):
        mixed = model(ids).logits
    assert_close(mixed[[1, 3]], without[[1, 3]], rtol=0, atol=1e-12)
    for row in (0, 2):
        with memory.write(torch.tensor([CONTEXTS[row]]), generator=[derive("row", row)]):
            assert_close(mixed[row], model(ids[row : row + 1]).logits[0], rtol=0, atol=1e-10)
        assert not torch.allclose(mixed[row], without[row], atol=1e-6), "the memory changes nothing"


def test_a_batch_without_any_context_is_read_without_memory():
    memory, batch = memory_on("small", LEARNED), batch_of(contexts=[[]] * 4)
    without = memory.model(batch.noised.ids).logits
    with opened(memory, batch):
        assert_close(memory.model(batch.noised.ids).logits, without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("contexts", [[[5, 6, 7, 8]], [[], [5, 6, 7, 8], []]])
def test_the_only_memory_of_a_batch_is_not_another_row_s(contexts):
    memory, batch = memory_on("small", LEARNED), batch_of(range(len(contexts)), contexts)
    without = memory.model(batch.noised.ids).logits
    with opened(memory, batch, is_of_next_row=True):
        assert_close(memory.model(batch.noised.ids).logits, without, rtol=0, atol=1e-12)


def test_a_memory_is_not_saved_under_the_number_of_another_row():
    memory = memory_on("small", LEARNED)
    with opened(memory, batch_of()), pytest.raises(ConfigError, match="some rows of this batch have no memory"):
        memory.export(2)
    with opened(memory, batch_of([0, 2])):
        memory.export(1)


# Gradients ----------------------------------------------------------------------------------------------------------


def gradients(memory, rows, block=None):
    batch = batch_of(rows)
    keys = [derive("row", row) for row in rows]
    with memory_of(memory, batch, pad_token_id=PAD, randomness=keys, is_read_at_anchor=block is None):
        lost = score(
            memory.model,
            batch,
            schedule=Linear(),
            weighting="scheduler",
            lower_layers=memory.lower_layers,
            norm="token",
            total_tokens=20,
            total_rows=4,
            block_size=block,
        )
        lost.loss.backward()
    parameters = [*memory.model.parameters()] + ([] if memory.learned is None else [*memory.learned.parameters()])
    found = [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in parameters]
    for each in parameters:
        each.grad = None
    return found


STEPS = {"learn_start": True, "learn_lr": True, "num_inner_steps": 2}
WRITES = {
    "first order": dataclasses.replace(PLAIN, **STEPS),
    "exact": dataclasses.replace(PLAIN, **STEPS, outer_gradient="exact"),
    "exact_top": dataclasses.replace(PLAIN, **STEPS, outer_gradient="exact_top"),
    "recall": LEARNED,
    "full": dataclasses.replace(MEMORIES["full"], outer_gradient="exact"),
    "dropout": dataclasses.replace(PLAIN, outer_gradient="exact", inner_dropout=0.3),
    "chunks": dataclasses.replace(PLAIN, outer_gradient="exact", chunk_length=4),
    "accumulated chunks": dataclasses.replace(LEARNED, chunk_length=4),
    "distillation": dataclasses.replace(PLAIN, outer_gradient="exact", inner_loss_type="distill"),
    "block diffusion": dataclasses.replace(PLAIN, outer_gradient="exact", learn_start=True),
}
SLOW = [(family, kind) for family in ("lladamoe", "llada2", "sdar", "dream", "mdlm") for kind in WRITES]
FAST = [("small", kind) for kind in WRITES if kind != "block diffusion"] + [
    ("lladamoe", "recall"),
    ("sdar", "block diffusion"),
]


@pytest.mark.parametrize(
    ("family", "kind"),
    [*FAST, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW if cell not in FAST)],
)
def test_the_gradient_of_a_mixed_batch_is_the_sum_of_its_rows(family, kind):
    block = 4 if kind == "block diffusion" else None
    if block is not None and family not in ("llada2", "sdar"):
        pytest.skip("a network that is not trained by block diffusion")
    memory = memory_on(family, WRITES[kind])
    memory.model.train()
    found = gradients(memory, [0, 1, 2, 3], block)
    alone = [gradients(memory, [row], block) for row in range(4)]
    for together, *parts in zip(found, *alone, strict=True):
        assert_close(together, sum(parts), rtol=1e-8, atol=1e-10)
    assert any(each.any() for each in found)


# Figures ------------------------------------------------------------------------------------------------------------


def test_nll_with_and_without_memory_are_of_the_rows_with_a_context():
    rows = row_columns(
        torch.tensor([[4.0], [6.0], [10.0]]),
        torch.tensor([2.0, NO_MEMORY, 5.0]),
        torch.tensor([[2], [3], [5]]),
        torch.ones(3, 1),
    )
    found = row_metrics(rows)
    assert {name: found[name] for name in ("nll", "nll_t1.0", "nll_memory", "nll_no_context")} == {
        "nll": 2.0,
        "nll_t1.0": 2.0,
        "nll_memory": 1.0,
        "nll_no_context": 2.0,
    }
    assert "nll_no_context" not in row_metrics(rows[[0, 2]])
    assert row_metrics(rows[[1]])["nll"] == 2.0
    assert not {"nll_memory", "nll_no_context"} & set(row_metrics(rows[[1]]))


def trainer_of(folder, contexts, config=LEARNED):
    memory = {f"mem_{field.name}": getattr(config, field.name) for field in dataclasses.fields(config)}
    rows = Dataset.from_list([feature(row, contexts) for row in range(4)])
    options = {"mem_enabled": True, "max_steps": 1, "save_strategy": "no", "per_device_eval_batch_size": 3}
    return run_kinds.trainer_of(tiny("small", torch.float64), folder, rows=rows, **options, **memory)


@pytest.mark.parametrize("bare", [[], None])
def test_an_evaluation_tells_bare_rows_apart(bare, tmp_path):
    """Also where a whole batch is bare, and where `datasets` has None in the place of a column."""
    mixed = trainer_of(tmp_path, [*CONTEXTS[::2], bare, bare]).evaluate()
    all_bare = trainer_of(tmp_path, [[]] * 4).evaluate()
    assert not {"eval_nll_memory", "eval_nll_no_context"} & set(all_bare)
    assert mixed["eval_loss"] == pytest.approx(all_bare["eval_loss"])
    both = (mixed["eval_nll"] + mixed["eval_nll_no_context"]) / 2
    assert both == pytest.approx(all_bare["eval_nll"]), "each half has equally many tokens"
    assert mixed["eval_nll_memory"] != pytest.approx(mixed["eval_nll"], abs=1e-4)


def test_steps_with_another_row_s_memory_count_nothing_where_there_is_none(tmp_path):
    mix = dataclasses.replace(LEARNED, batch_mix="0,0,0,1", batch_reach=2)
    logs = []
    for contexts in ([CONTEXTS[0], [], [], []], CONTEXTS):
        trainer = trainer_of(tmp_path, contexts, mix)
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert not {"nll_memory_other", "fast_norm", "inner_loss_1"} & set(logs[0])
    assert {"nll_memory_other", "fast_norm", "inner_loss_1", "nll_no_context"} <= set(logs[1])


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(PLAIN, per_sample=False), "mem_per_sample=False: 2 of the 4 rows of a batch have no"),
        (dataclasses.replace(LEARNED, batch_mix="1,1,1", batch_reach=2), "mem_batch_mix='1,1,1': 2 of the 4 rows"),
    ],
)
def test_bare_rows_that_could_not_be_as_without_memory_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        opened(memory_on("small", config), batch_of())


@pytest.mark.parametrize("bare", [[], None])
def test_a_trainer_needs_a_row_with_a_context(bare, tmp_path):
    with pytest.raises(DataError, match="none of the 4 rows to train on has a text to write"):
        trainer_of(tmp_path, [bare] * 4).train()


def test_contexts_may_be_tensors():
    rows = [{"input_ids": [5], "labels": [5], "context_ids": ids} for ids in (torch.tensor([6, 7]), None, [8])]
    batch = Collator(PAD)(rows)
    assert batch["context_ids"].tolist() == [[6, 7], [PAD, PAD], [8, PAD]]
    assert batch["is_context"].sum(1).tolist() == [2, 0, 1]


def written(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TRAIN = {
    "mem_enabled": True,
    "mem_write_source": "context",
    "mem_per_sample": True,
    "mem_inner_layer_fraction": 0.5,
    "mem_inner_rank": 4,
    "max_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "context_column": "document",
}


def trains(network, folder, *more, **options):
    command = ["train", "--model", str(network[0]), "--output_dir", str(folder / "trained"), *more]
    for name, value in (TRAIN | options).items():
        command += [f"--{name}", str(value)]
    return main(command)


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_best_metric_that_is_not_measured_is_refused_before_the_training(dry, network, tmp_path, capsys):
    data, bare = written(tmp_path, "data", WORDS * 4), written(tmp_path, "bare", WORDS[1:])
    options = {"dataset_args": data, "eval_dataset_args": bare, "eval_strategy": "steps", "save_strategy": "steps"}
    for best in ("nll_memory", "eval_nll_memory", "nll_no_context", "nnl"):
        named = {"load_best_model_at_end": True, "metric_for_best_model": best}
        assert trains(network, tmp_path, *dry, **options, **named) != 0
        said = capsys.readouterr().err
        assert f"metric_for_best_model='{best}' is not measured on these data; possible: loss, nll, ppl" in said


@pytest.mark.parametrize("best", ["nll", "nll_memory", "eval_nll_no_context"])
def test_the_best_of_what_is_measured_is_kept(best, network, tmp_path):
    data = written(tmp_path, "data", WORDS * 4)
    options = {"dataset_args": data, "eval_dataset_args": data, "eval_strategy": "steps", "save_strategy": "steps"}
    named = {"load_best_model_at_end": True, "metric_for_best_model": best}
    assert trains(network, tmp_path, **options, **named) == 0


def test_training_needs_a_row_with_a_context(network, tmp_path, capsys):
    bare = written(tmp_path, "bare", WORDS[1:])
    assert trains(network, tmp_path, dataset_args=bare) != 0
    assert "no row of train has a text in 'document' (columns beside the conversation: none)" in capsys.readouterr().err
    # The one row with a context is left out, as it is too long; the other alone writes no memory.
    long = written(tmp_path, "long", [{**WORDS[0], "prompt": "w1 " * 30}, WORDS[1]])
    assert trains(network, tmp_path, dataset_args=long, max_length=20) != 0
    assert "none of the 1 rows to train on has a text to write" in capsys.readouterr().err


# Data ---------------------------------------------------------------------------------------------------------------


def test_bare_rows_are_kept_and_counted(network, tmp_path):
    tokenizer, options = network[1], EncodingOptions(context_column="document")
    bare = [{"prompt": "w1", "response": "w2", **more} for more in ({}, {"document": None}, {"document": " "})]
    path = written(tmp_path, "mixed", [*bare, WORDS[0], {**WORDS[1], "document": "w6"}])
    splits = load_conversations(path)
    rows = encode_all(splits["train"], tokenizer, options)
    assert context_lengths(rows) == [0, 0, 0, 3, 1]
    facts = preprocess(splits, path, tokenizer, options, tmp_path / "out")["splits"]["train"]
    assert (facts["rows"], facts["without_context"]) == (5, 3)
    found, _ = load_preprocessed(f"{tmp_path / 'out'}[train:4]", tokenizer, options, tmp_path)
    lengths = context_lengths(found["train"])
    assert lengths == [len(row) for row in found["train"]["context_ids"]]
    kept, counts = fit(found["train"], [2] * 4, [1] * 4, max_length=9, truncation="filter", context_lengths=lengths)
    assert counts.without_context == lengths.count(0) >= 2
    assert f"{counts.without_context} without a context, for which no memory is written" in counts.words()
    assert [kept[row]["context_ids"] for row in range(4)] == found["train"]["context_ids"][:]
    with pytest.raises(DataError, match=r"no row of mine has a text in 'text' \(columns beside .*: document\)"):
        check_contexts([splits["train"]], "text", "mine")


def test_a_folder_without_contexts_is_joined_with_one_that_has_them(network, tmp_path):
    tokenizer, options = load_tokenizer(network[0]), EncodingOptions(context_column="document")
    for name, rows, made in (("with", WORDS[:1], options), ("bare", WORDS[1:], EncodingOptions())):
        path = written(tmp_path, name, rows)
        preprocess(load_conversations(path), path, tokenizer, made, tmp_path / f"{name}.out")
    joined = f"{tmp_path / 'bare.out'} + {tmp_path / 'with.out'}"
    found, _ = load_preprocessed(joined, tokenizer, options, tmp_path)
    lengths = context_lengths(found["train"])
    assert lengths == [0, 3]
    kept, _ = fit(found["train"], [2, 2], [1, 1], max_length=9, truncation="filter", context_lengths=lengths)
    assert [len(row["context_ids"]) for row in kept] == [0, 3]
    # By its folder, and by what it was made from, in an evaluation alone.
    for name in (str(tmp_path / "bare.out"), written(tmp_path, "bare", WORDS[1:])):
        with pytest.raises(DataError, match="context_column: made with None, wanted document"):
            load_preprocessed(name, tokenizer, options, tmp_path)
        found, manifests = load_preprocessed(name, tokenizer, options, tmp_path, may_be_bare=True)
        assert context_lengths(found["train"]) == [0]
        assert list(manifests) == [str(tmp_path / "bare.out")]
    more = {"load_preprocessed_data": True, "eval_strategy": "steps", "dataset_args": tmp_path / "with.out"}
    assert trains(network, tmp_path, **more, eval_dataset_args=tmp_path / "bare.out") == 0
