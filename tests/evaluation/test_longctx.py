"""The offline suite: contexts as long as asked in the model's own tokens, every option checked, answers hidden."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memdlm.cli.main import main
from memdlm.data import build_word_tokenizer
from memdlm.data.synthetic import TASKS
from memdlm.data.wording import ENDS, SENTENCES, WORDINGS
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.longctx import dataset, documents_of, make_task, parse_lengths, process_results
from memdlm.randomness import derive


def pieces():
    """A tokenizer that cuts words into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [word for task in TASKS.values() for word in task().words()]
    tokenizer.train_from_iterator(
        [" ".join(words)], trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<e>", mask_token="<m>")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("length", [260, 400])
def test_contexts_are_filled_up_to_their_length(name, wording, length):
    """Short of a word of symbols, or of a sentence of English."""
    tokenizer, task = pieces(), make_task(name, {name: {"wording": wording}})

    def count(text):
        return len(tokenizer(text)["input_ids"])

    parts = [*map(" ".join, (*SENTENCES, *ENDS)), *task.said.filler] if wording == "english" else task.words()
    longest = max(count(f" {part}.") for part in parts)
    for document in documents_of(task, length, (0, name, length, 1), count):
        assert length - longest <= count(document["context"]) <= length


@pytest.mark.parametrize("name", TASKS)
def test_with_words_as_tokens_contexts_are_the_tasks_own(name):
    task = make_task(name, {})
    sample = task.sample(derive(0, name, 60, 3), 60)
    documents = documents_of(task, 60, (0, name, 60, 3), lambda text: len(text.split()))
    assert [document["answer"] for document in documents] == list(sample.answers)
    first = documents[0]
    assert f"{first['context']} {first['question']}" == sample.messages[0]["content"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_word_tokenizer(TASKS["kv"]().words(), sentences=True).save_pretrained(path)
    return str(path)


def test_lengths_alternate_and_options_reach_the_task(folder):
    found = dataset(
        synthetic_task="kv",
        max_seq_lengths=[30, 40],
        num_samples=2,
        task_options={"kv": {"num_pairs": 2, "num_questions": 1}},
        pretrained=folder,
        mem_enabled=True,
    )["test"]
    assert found["length"] == [30, 40, 30, 40]
    assert all(context.count(" likes ") == 2 for context in found["context"])
    again = dataset(synthetic_task="kv", max_seq_lengths=[30], num_samples=1, data_seed=1, tokenizer=folder)["test"]
    assert again[0]["context"] != found[0]["context"]


def test_results_are_kept_by_length():
    document = {"answer": "v1 v2", "length": 30, "chance": 0.25}
    assert process_results(document, [" v1  v2 "]) == {"exact_match": 1.0, "30": 1.0, "chance": 0.25}
    assert process_results(document, ["v1"])["30"] == 0.0


def test_lengths_may_be_written_in_thousands():
    assert parse_lengths("4k") == [4096]
    assert parse_lengths([1024, "2K"]) == [1024, 2048]
    for bad in ("long", [], [0], [None]):
        with pytest.raises(ConfigError, match="max_seq_lengths"):
            parse_lengths(bad)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"synthetic_task": "kvs"}, ConfigError, "synthetic task 'kvs' is not known.*Did you mean 'kv'"),
        ({"task_options": {"k": {}}}, ConfigError, "synthetic task 'k' is not known"),
        ({"task_options": {"kv": {"num_pair": 1}}}, ConfigError, "'num_pair' is not known.*'num_pairs'"),
        ({"pretrained": None}, ConfigError, "no tokenizer to count with"),
        ({"max_seq_lengths": 10}, DataError, "kv: the facts need more than 10 tokens"),
    ],
)
def test_bad_metadata_is_refused(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        dataset(**{"synthetic_task": "kv", "num_samples": 1, "pretrained": folder, **arguments})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, "max_seq_lengths") for name in ("max_seq_length", "max_seq_len", "max_seq_lenghts", "seq_lengths")),
        ("num_sample", "num_samples"),
        ("task_option", "task_options"),
    ],
)
def test_another_spelling_in_the_metadata_is_refused_and_guessed(name, meant, capsys):
    arguments = ["eval", "--model", "nowhere", "--tasks", "memdlm_longctx", "--metadata"]
    assert main([*arguments, json.dumps({name: [64]})]) == 2
    assert f"metadata: no task reads {name!r}. Did you mean {meant!r}?" in capsys.readouterr().err
    # Another name may be that of somebody's task.
    assert main([*arguments, json.dumps({"max_length": 64, "num_fewshot": 1})]) != 0
    assert "metadata: no task reads" not in capsys.readouterr().err
