"""Contexts: texts that a memory is written from and the network is never shown, from file to training."""

import json

import pytest
import torch
from torch.testing import assert_close

from memdlm.cli.main import main
from memdlm.data import Collator, EncodingOptions, load_conversations
from memdlm.data.documents import plain_ids
from memdlm.data.encoding import encode_all
from memdlm.data.preprocess import load_preprocessed, preprocess
from memdlm.data.synthetic import KeyValueRecall
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion import Corrupted
from memdlm.errors import DataError
from memdlm.evaluation import recall
from memdlm.evaluation.recall import encode_samples, written_texts
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import SmallDLMConfig, build_model
from memdlm.training import Batch
from memdlm.training.outer import context_only, memory_of
from memdlm.types import IGNORE_INDEX
from tiny import MASK, PAD, random_ids, rng, saved_with_words, tiny

CONFIG = MemoryConfig.recall(write_source="context", inner_layer_fraction=0.5, inner_rank=4, inner_alpha=8.0, strides=2)
ROWS = [
    {"prompt": "w1 w2", "response": "w3", "context": "w4 w1 w5"},
    {"messages": [{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3 w4"}], "context": "w6"},
]


@pytest.fixture(autouse=True)
def _own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return str(path)


@pytest.fixture
def network(tmp_path):
    return saved_with_words("small", tmp_path / "model")


def test_a_context_is_plain_text_in_both_layouts_and_never_part_of_the_conversation(source, network, tmp_path):
    tokenizer, options = network[1], EncodingOptions(context_column="context")
    conversations = load_conversations(source)["train"]
    rows = encode_all(conversations, tokenizer, options)
    shown = encode_all(conversations, tokenizer, EncodingOptions())
    for row, plain, record in zip(rows, shown, ROWS * 4, strict=True):
        assert row.pop("context_ids") == plain_ids(tokenizer, record["context"])
        assert row == plain
    preprocess({"train": conversations}, source, tokenizer, options, tmp_path / "out")
    found, _ = load_preprocessed(source, tokenizer, options, tmp_path / "nowhere")
    assert found["train"]["context_ids"][0] == plain_ids(tokenizer, ROWS[0]["context"])
    # A baseline without contexts trains on the same folder; the other way round there is nothing to write.
    load_preprocessed(source, tokenizer, EncodingOptions(), tmp_path / "nowhere")
    preprocess({"train": conversations}, source, tokenizer, EncodingOptions(), tmp_path / "out", overwrite=True)
    with pytest.raises(DataError, match="context_column: made with None, wanted context"):
        load_preprocessed(source, tokenizer, options, tmp_path / "nowhere")


def test_a_context_that_is_no_text_is_named(network):
    row = {"messages": ROWS[1]["messages"], "context": 3}
    with pytest.raises(DataError, match="row 0: context_column: 'context' must be a column of text, got 3"):
        encode_all([row], network[1], EncodingOptions(context_column="context"))


def batch_of(contexts, labels=None):
    ids = random_ids(len(contexts), 8)
    rows = [
        {"input_ids": row, "labels": [-100] * 4 + row[4:], "context_ids": context}
        for row, context in zip(ids.tolist(), contexts, strict=True)
    ]
    given = Collator(PAD)(rows)
    is_masked = torch.arange(8).expand(len(rows), -1) >= 6
    return Batch(
        clean=ids,
        labels=given["labels"] if labels is None else labels,
        attention_mask=None,
        is_padding=given["is_padding"],
        is_maskable=given["labels"] != IGNORE_INDEX,
        noised=Corrupted(ids.masked_fill(is_masked, MASK), is_masked, torch.full((len(rows),), 0.5)),
        context=given["context_ids"],
        is_context=given["is_context"],
    )


def fast_weights(memory, batch):
    randomness = [rng(row) for row in range(len(batch.clean))]
    with memory_of(memory, batch, pad_token_id=PAD, randomness=randomness):
        return [value.detach().clone() for value in memory.fast.tensors()]


def test_what_is_written_is_the_context_alone():
    """Padding of shorter contexts changes nothing, and labels reach no fast weight."""
    memory = ParametricMemory(tiny("small", torch.float64), CONFIG, mask_token_id=MASK)
    contexts = [random_ids(1, 9)[0].tolist(), random_ids(1, 5, seed=1)[0].tolist()]
    together = batch_of(contexts)
    written = fast_weights(memory, together)
    for row, context in enumerate(contexts):
        with memory.write(torch.tensor([context]), generator=[rng(row)]):
            for value, alone in zip(written, memory.fast.tensors(), strict=True):
                assert_close(value[row : row + 1], alone, rtol=0, atol=1e-12)
    others = batch_of(contexts, labels=together.labels.masked_fill(together.labels != IGNORE_INDEX, 5))
    assert all(torch.equal(a, b) for a, b in zip(written, fast_weights(memory, others), strict=True))


def test_rows_without_contexts_are_refused():
    batch = batch_of([[5, 6]])
    bare = Batch(**{name: getattr(batch, name) for name in Batch.__slots__ if not name.endswith("context")})
    with pytest.raises(DataError, match="the rows have no `context_ids`"):
        context_only(bare, MASK)
    rows = [{"input_ids": [5], "labels": [5], "context_ids": [6]}, {"input_ids": [5], "labels": [5]}]
    with pytest.raises(DataError, match="1 of the 2 rows of a batch have `context_ids`"):
        Collator(PAD)(rows)


def test_a_mask_token_in_a_context_is_not_learned():
    ids, labels, _ = context_only(batch_of([[5, MASK, 6], [7]]), MASK)
    assert ids.tolist() == [[5, MASK, 6], [7, PAD, PAD]]
    assert labels.tolist() == [[5, IGNORE_INDEX, 6], [7, IGNORE_INDEX, IGNORE_INDEX]]


def test_questions_are_asked_with_the_context_dropped(network):
    task = KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=4, num_questions=2, is_adjacent=True)
    tokenizer = build_word_tokenizer(task.words())
    samples = task.records(3, 8, seed="context dropped")
    texts = encode_samples(tokenizer, samples, "dropped")
    written = [tokenizer.decode(text.input_ids) for text in written_texts(tokenizer, samples, "dropped", texts)]
    assert written == [sample.context for sample in samples]
    shown = [" ".join(message["content"] for message in sample.without_context()) for sample in samples]
    assert not any(sample.context in text for sample, text in zip(samples, shown, strict=True))
    model = build_model(SmallDLMConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48), seed=0).eval()
    memory = ParametricMemory(
        model, MemoryConfig(inner_lr=5.0, inner_layer_fraction=0.5), mask_token_id=tokenizer.mask_token_id
    )
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    found = recall(model, tokenizer, samples, steps=2, memory=memory, context="dropped")
    hook.remove()
    assert found.questions == 6
    assert {ids.shape[1] for ids in seen} == {8, 10}, "contexts of 8 words, conversations of 10 tokens"
    bare = [type(sample)(sample.messages, sample.answers) for sample in samples]
    with pytest.raises(DataError, match="hold their context"):
        recall(model, tokenizer, bare, memory=memory, context="dropped")


@pytest.mark.parametrize("is_preprocessed", [False, True])
def test_memorising_is_trained_from_the_command_line(is_preprocessed, source, network, tmp_path, capsys):
    """Beside rows without a document, which are trained without memory."""
    model, out = str(network[0]), tmp_path / "trained"
    (tmp_path / "bare.jsonl").write_text(json.dumps({"prompt": "w1 w2", "response": "w3"}) + "\n")
    mixed = f"{source}[train:7,test:1] + {tmp_path / 'bare.jsonl'}"
    data = ["--dataset_args", mixed, "--context_column", "context"]
    if is_preprocessed:
        assert main(["preprocess", "--model", model, *data, "--output_dir", str(tmp_path / "data")]) == 0
        data += ["--load_preprocessed_data", "True"]
    flags = {
        "output_dir": out,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "eval_strategy": "epoch",
        "mem_enabled": True,
        "mem_write_source": "context",
        "mem_outer_gradient": "exact",
        "mem_learn_start": True,
        "mem_per_sample": True,
        "mem_inner_layer_fraction": 0.5,
        "mem_inner_rank": 4,
        "logging_steps": 1,
        "report_to": "none",
    }
    command = ["train", "--model", model, *data]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 0
    assert "1 without a context, for which no memory is written" in capsys.readouterr().err
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    norms = [entry["fast_norm"] for entry in log if "loss" in entry]
    assert len(norms) == 2
    assert min(norms) > 0
    assert sum("nll_no_context" in entry for entry in log) == 1, "the row is in one of the two steps"
    assert all("nll_memory" in entry for entry in log if "loss" in entry)
    assert any("eval_nll_memory" in entry for entry in log)
    doc = tmp_path / "doc.txt"
    doc.write_text("w4 w5 w6")
    assert main(["memorize", "--model", str(out), "--file", str(doc), "--output", str(tmp_path / "doc.mem")]) == 0
    assert main(["ask", "--model", str(out), "--memory", str(tmp_path / "doc.mem"), "w1", "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context_column", "context"], "context_column='context' has no effect without mem_enabled=True"),
        (["--mem_enabled", "True", "--mem_write_source", "context"], "needs context_column"),
        (
            ["--mem_enabled", "True", "--mem_write_source", "context", "--context_column", "context"],
            "mem_per_sample=False: 1 of the 9 rows of train have no context",
        ),
        (
            ["--mem_enabled", "True", "--mem_write_source", "context", "--context_column", "document"],
            "no row of train has a text in 'document' (columns beside the conversation: context)",
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_contexts_and_their_writes_belong_together(dry, more, message, source, network, tmp_path, capsys):
    (tmp_path / "bare.jsonl").write_text(json.dumps({"prompt": "w1 w2", "response": "w3"}) + "\n")
    mixed = f"{source} + {tmp_path / 'bare.jsonl'}"
    command = ["train", "--model", str(network[0]), "--dataset_args", mixed, "--eval_strategy", "no", *dry]
    assert main([*command, "--output_dir", str(tmp_path / "out"), "--report_to", "none", *more]) != 0
    assert message in capsys.readouterr().err
