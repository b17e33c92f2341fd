"""memorize and ask: one write, many questions, and a memory that is kept only if it may be."""

import io
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memdlm import GenerationConfig, MemoryConfig, ParametricMemory, generate, load_model, load_tokenizer
from memdlm.cli.main import main
from memdlm.data.documents import Document
from memdlm.data.synthetic import exact_match
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import DataError
from memdlm.memory import LocalSGD, inspect_memory, read_memory
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.documents import document_ids
from memdlm.workflows.sessions.memorize import MemorizeOptions
from memdlm.workflows.sessions.writing import Memorizer
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms
from memdlm.workflows.studies.recall_study import recall_data, trained
from tiny import V, tiny

WORDS = [f"w{index:02}" for index in range(V - 5)]
TEXT = " ".join(WORDS[index * 7 % len(WORDS)] for index in range(60))
FLAGS = ["--mem_inner_rank", "4", "--mem_inner_layer_fraction", "0.5", "--mem_masking_strategy", "strided"]


def saved(family, folder):
    network = tiny(family)
    network.config.max_position_embeddings = 40
    network.save_pretrained(folder)
    build_word_tokenizer(WORDS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved("lladamoe", tmp_path_factory.mktemp("model"))


@pytest.fixture
def doc(tmp_path):
    (tmp_path / "doc.md").write_text(TEXT)
    return tmp_path / "doc.md"


def memorize(model, doc, *more):
    output = doc.with_name("doc.mem")
    return main(["memorize", "--model", model, "--file", str(doc), "--output", str(output), *FLAGS, *more]), output


def ask(model, memory, *more):
    return main(["ask", "--model", model, "--memory", str(memory), "--max_new_tokens", "3", *more])


def test_a_document_is_written_once_in_chunks_and_asked_many_times(model, doc, capsys, monkeypatch):
    status, memory = memorize(model, doc)
    assert status == 0
    out, err = capsys.readouterr()
    assert "60 tokens are written in chunks of 40, the positions the model was trained on." in err
    assert "doc.mem: 60 tokens written in" in out
    assert "kept without a gate" in out
    facts = inspect_memory(memory).provenance
    assert (facts["source"], facts["tokens"], facts["num_scored"]) == (str(doc), 60, 60)
    writes = []
    monkeypatch.setattr(ParametricMemory, "write", lambda *_, **__: writes.append(1))
    assert ask(model, memory, "w01 w02", "w03") == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert len(answers) == 2
    assert "2 answers:" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("w01 w02\n\nw03\n"))
    assert ask(model, memory) == 0
    assert capsys.readouterr().out.splitlines() == answers
    assert not writes, "asking writes nothing"


def test_a_file_of_questions_is_answered_and_compared(model, doc, tmp_path, capsys):
    _, memory = memorize(model, doc)
    ask(model, memory, "w01")
    right = capsys.readouterr().out.splitlines()[-1]
    rows = [
        {"question": "w01", "answer": right, "id": 7},
        {"question": "w02", "answer": "nonsense"},
        {"question": "w3"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--questions", str(tmp_path / "questions.jsonl"), "--batch_size", "2"]
    assert ask(model, memory, *flags) == 0
    printed, err = capsys.readouterr()
    assert "1 of 2 answers are exact" in err
    assert ask(model, memory, *flags, "--output", str(tmp_path / "answers.jsonl")) == 0
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert found == [json.loads(line) for line in printed.splitlines()]
    assert [row.get("correct") for row in found] == [True, False, None]
    assert found[0] == {**rows[0], "response": right, "correct": True}
    (tmp_path / "bad.jsonl").write_text('{"question": "w01"}\n{"text": "w01"}')
    assert ask(model, memory, "--questions", str(tmp_path / "bad.jsonl")) == 2
    assert "row 1 needs a 'question'" in capsys.readouterr().err


def test_the_document_can_be_shown_as_well(model, doc, capsys):
    doc.write_text("w01 w05 w09")
    _, memory = memorize(model, doc)
    capsys.readouterr()
    assert ask(model, memory, "--keep_context", "w02") == 0
    shown = capsys.readouterr().out
    assert ask(model, memory, "w01 w05 w09 w02") == 0
    assert capsys.readouterr().out == shown
    moved = doc.rename(doc.with_name("moved.md"))
    assert ask(model, memory, "--keep_context", "w02") == 2
    assert "is not there; name it with --file" in capsys.readouterr().err
    assert ask(model, memory, "--keep_context", "w02", "--file", str(moved)) == 0
    moved.write_text("w01")
    assert ask(model, memory, "--keep_context", "w02", "--file", str(moved)) == 2
    assert "is not the document that was memorised" in capsys.readouterr().err


@pytest.mark.parametrize("gate", ["held_out", "written"])
def test_a_gate_keeps_what_helps_and_refuses_what_harms(gate, doc, tmp_path, capsys, monkeypatch):
    model = saved("small", tmp_path / "model")
    doc.write_text(" ".join(["w01 w02 w03 w04"] * 9))  # what is held out can be told from the rest
    more = ["--gate", gate, "--mem_num_inner_epochs", "10", "--mem_inner_lr", "0.05"]
    status, memory = memorize(model, doc, *more)
    assert status == 0
    assert f"\nkept: the loss on {35 if gate == 'written' else 4} masked " in capsys.readouterr().out
    facts = read_memory(memory).provenance["gate"]
    assert (facts["name"], facts["after"] < facts["before"]) == (gate, True)
    first = inspect_memory(memory)
    monkeypatch.setattr(LocalSGD, "clip", lambda self, gradients: [-10 * each for each in gradients])  # steps uphill
    status, _ = memorize(model, doc, *more, "--seed", "1", "--overwrite")
    assert status == 1
    assert "\nnot kept: the loss on" in capsys.readouterr().out
    assert inspect_memory(memory) == first, "what was kept before stays"
    status, _ = memorize(model, doc, "--overwrite")
    assert status == 0
    assert inspect_memory(memory) != first


def test_a_document_that_mentions_special_tokens_means_the_words():
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate("<|mask>ab ")}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|e|>", mask_token="<|mask|>")
    document = Document(path="x", text="a<|mask|>b", sha256="")
    ids = document_ids(document, tokenizer, as_message=False)
    assert len(ids) == 10
    assert tokenizer.mask_token_id not in ids
    assert tokenizer.mask_token_id in tokenizer(document.text)["input_ids"]
    with pytest.raises(DataError, match="no chat template"):
        document_ids(document, tokenizer, as_message=True)


def test_held_out_tokens_are_never_seen_by_the_trial(model, doc, monkeypatch):
    tokenizer = load_tokenizer(model)
    memory = ParametricMemory(load_model(model), MemoryConfig(), mask_token_id=tokenizer.mask_token_id)
    options = MemorizeOptions(model=model, file=str(doc), output="x", gate="held_out", held_out_share=0.25)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    seen, write = [], ParametricMemory.write
    monkeypatch.setattr(
        ParametricMemory, "write", lambda self, *args, **kwargs: (seen.append(args), write(self, *args, **kwargs))[1]
    )
    done = Memorizer(memory, options.rule, options.seed, Display()).run([ids])[0]
    (trial, labels), (whole, all_labels) = seen
    is_hidden = trial[0] == tokenizer.mask_token_id
    assert is_hidden.sum() == 15 == done.memory.provenance["gate"]["num_scored"]
    assert (labels[0][is_hidden] == -100).all()
    assert trial[0][~is_hidden].equal(ids[~is_hidden])
    assert whole[0].equal(ids), "the memory that is kept knows the whole document"
    assert all_labels[0].equal(ids)


def test_a_compressed_memory_says_what_it_lost(model, doc, capsys):
    status, memory = memorize(model, doc, "--compress_rank", "1", "--mem_num_inner_steps", "4")
    assert status == 0
    assert "before compression, which lost" in capsys.readouterr().out
    saved = read_memory(memory)
    assert saved.rank == 1
    assert 0 < saved.provenance["compression"]["relative_error"] < 1
    assert saved.provenance["loss_before_compression"] != saved.provenance["loss_after"]
    assert ask(model, memory, "w01") == 0
    assert main(["info", str(memory)]) == 0
    assert "relative_error" in capsys.readouterr().out
    assert main(["info", str(memory.parent), "--json"]) == 0
    assert [each["rank"] for each in json.loads(capsys.readouterr().out)] == [1]


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("memorize", ["--file", "x.txt"], "--output is missing"),
        ("memorize", ["--file", "none.txt", "--output", "x.mem"], "document: 'none.txt' does not exist"),
        ("memorize", ["--file", "x", "--output", "y", "--held_out_share", "0.3"], "no effect with gate='none'"),
        ("memorize", ["--file", "x", "--output", "y", "--gate", "strict"], "Possible: none, held_out, written"),
        ("ask", ["w01"], "--memory is missing"),
        ("ask", ["--memory", "none.mem", "w01"], "memory 'none.mem': there is no such folder"),
        ("ask", ["--memory", "x", "--file", "y", "w01"], "file has no effect without keep_context"),
        ("ask", ["--memory", "x", "--output", "y", "w01"], "output has no effect without questions"),
        ("ask", ["--memory", "x", "--questions", "y.jsonl", "w01"], "not both"),
    ],
)
def test_bad_flags_end_in_one_line(command, flags, message, model, capsys):
    assert main([command, "--model", model, *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_memory_of_another_model_is_refused_and_none_is_overwritten_unasked(model, doc, tmp_path, capsys):
    _, memory = memorize(model, doc)
    tiny("lladamoe", seed=1).save_pretrained(tmp_path / "other")
    load_tokenizer(model).save_pretrained(tmp_path / "other")
    assert ask(str(tmp_path / "other"), memory, "w01") == 2
    assert "it was written for other base weights" in capsys.readouterr().err
    assert memorize(model, doc, "--seed", "1")[0] == 2
    assert "holds a memory already" in capsys.readouterr().err
    assert memorize(model, doc, "--seed", "1", "--overwrite")[0] == 0
    doc.write_text("w01 w02")
    assert memorize(model, doc, "--seed", "1")[0] == 2
    assert memorize(str(tmp_path / "other"), doc, "--seed", "1", "--overwrite")[0] == 0
    assert memorize(model, doc, "--seed", "1")[0] == 2, "what another model wrote is not unchanged"
    assert "it was written for other base weights" in capsys.readouterr().err
    assert memorize(model, doc, "--seed", "1", "--overwrite")[0] == 0


@pytest.mark.slow
def test_a_memory_file_answers_what_the_study_answers_with_the_context_gone(tmp_path):
    """Trained as in the recall study (seed 0: 99.4 %); 64 documents of 36 words, 8 questions each, files only."""
    torch.set_num_threads(1)
    plan = RecallPlan()
    data = recall_data(plan)
    trained(plan, data, arms(plan)[OURS], 0).save_final(tmp_path / "model")
    correct = total = without = 0
    model, tokenizer = str(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    network = load_model(model)
    memory = ParametricMemory(network, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)

    def answers(questions):
        prompts = [[{"role": "user", "content": question}] for question in questions]
        return generate(network, tokenizer, prompts, GenerationConfig(max_new_tokens=2)).texts

    for number, sample in enumerate(data.by_length[36]):
        questions = [turn["content"] for turn in sample.messages if turn["role"] == "user"]
        words = questions[0].split()
        questions[0] = " ".join(words[36:])
        with memory.write(torch.tensor([tokenizer(" ".join(words[:36]))["input_ids"]])):
            memory.save(tmp_path / f"{number}.mem")
        with memory.recall(tmp_path / f"{number}.mem"):
            found = answers(questions)
        correct += sum(map(exact_match, sample.answers, found))
        without += sum(map(exact_match, sample.answers, answers(questions)))
        total += len(questions)
        if number == 0:  # the same through the commands
            (tmp_path / "doc.txt").write_text(" ".join(words[:36]))
            rows = [{"question": q, "answer": a} for q, a in zip(questions, sample.answers, strict=True)]
            (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
            flags = ["--file", str(tmp_path / "doc.txt"), "--output", str(tmp_path / "doc.mem")]
            assert main(["memorize", "--model", model, *flags]) == 0
            flags = ["--questions", str(tmp_path / "questions.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
            assert ask(model, tmp_path / "doc.mem", *flags) == 0
            rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
            assert sum(row["correct"] for row in rows) >= 7
    assert total == 512
    assert correct / total >= 0.97
    assert without / total < 0.1
    chosen_among_two(model, data.by_length[36], tmp_path)


def chosen_among_two(model, samples, folder):
    """Of the memories of two documents without a common key, the right one answers (chance: half of the questions)."""
    documents, right, total = [], 0, 0
    for sample in samples:
        questions = [turn["content"] for turn in sample.messages if turn["role"] == "user"]
        words = questions[0].split()
        documents.append((set(words[:36]), [" ".join(words[36:]), *questions[1:]]))
    keys = [{word for word in words if word.startswith("k")} for words, _ in documents]
    apart = [
        (one, other) for one in range(len(keys)) for other in range(one + 1, len(keys)) if not keys[one] & keys[other]
    ]
    for one, other in apart[:16]:
        rows = [{"question": each, "own": place} for place in (one, other) for each in documents[place][1]]
        (folder / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
        memories = [word for place in (one, other) for word in ("--memory", str(folder / f"{place}.mem"))]
        flags = ["--questions", str(folder / "two.jsonl"), "--output", str(folder / "found.jsonl"), "--overwrite"]
        assert main(["ask", "--model", model, "--max_new_tokens", "2", *memories, *flags]) == 0
        for row in map(json.loads, (folder / "found.jsonl").read_text().splitlines()):
            right += row["memory"] == str(folder / f"{row['own']}.mem")
            total += 1
    print(f"{right} of {total} questions were answered by the memory of their document")
    assert right / total >= 0.85
