"""Memories as objects: many are written at once, kept, shown, put together and asked, through the command line."""

import io
import json
import shutil

import pytest
import torch
from torch.testing import assert_close

from memdlm import load_model, load_tokenizer, score
from memdlm.cli.main import main
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.evaluation.masked_loss import Interference
from memdlm.memory import ParametricMemory, read_memory
from memdlm.randomness import derive
from memdlm.workflows.sessions import ask as asking
from memdlm.workflows.sessions import combine as combining
from tiny import V, tiny
from trees import tree

WORDS = [f"w{index:02}" for index in range(V - 5)]
FLAGS = ["--mem_inner_rank", "4", "--mem_inner_layer_fraction", "0.5", "--mem_inner_lr", "0.5"]


def text(start, length):
    return " ".join(WORDS[(start + 7 * index) % len(WORDS)] for index in range(length))


def saved(family, folder):
    network = tiny(family)
    network.config.max_position_embeddings = 40
    network.save_pretrained(folder)
    build_word_tokenizer(WORDS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved("small", tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with documents of several lengths, in which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    for number, (name, length) in enumerate({"a.md": 9, "b.txt": 30, "deep/c.md": 21, "long.txt": 60}.items()):
        (tmp_path / "notes" / name).write_text(text(number, length))
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "notes" / ".hidden.txt").write_text("w01")
    return tmp_path


def memorize(model, *more, output="memories"):
    files = [] if "--file" in more else ["--file", "notes"]
    return main(["memorize", "--model", model, *files, "--output", output, *FLAGS, *more])


@pytest.fixture
def kept(model, here, capsys):
    assert memorize(model) == 0
    capsys.readouterr()
    return here


def rows(found):
    return [line.split() for line in found.splitlines() if ".mem" in line]


@pytest.mark.parametrize("family", ["small", "llada", "llada2", "lladamoe"])
def test_documents_written_together_become_what_each_becomes_alone(family, here, capsys):
    model = saved(family, here / "model")
    assert memorize(model, "--gate", "written", "--compress_rank", "2") in (0, 1)
    out, err = capsys.readouterr()
    assert "1 files are no documents and are left out: 'notes/picture.png'" in err
    assert out.count("together with 2 more") == 3, "the long one is written in chunks, by itself"
    assert "60 tokens are written in chunks of 40" in err
    names = sorted(path.name for path in (here / "memories").iterdir())
    for name in names:
        document = here / "notes" / name.replace("-", "/").replace(".mem", "")
        document = next(each for each in (document.with_suffix(".md"), document.with_suffix(".txt")) if each.exists())
        flags = ["--file", str(document), "--gate", "written", "--compress_rank", "2"]
        assert memorize(model, *flags, output="alone.mem") == 0
        together, alone = read_memory(here / "memories" / name), read_memory(here / "alone.mem")
        for module, pair in alone.pairs.items():
            other = together.pairs[module]
            assert_close(other["B"] @ other["A"], pair["B"] @ pair["A"], rtol=1e-3, atol=1e-5)
        for fact in ("source", "source_sha256", "tokens", "ids_sha256", "num_scored", "written_with"):
            assert together.provenance[fact] == alone.provenance[fact], fact
        assert together.provenance["loss_after"] == pytest.approx(alone.provenance["loss_after"], rel=1e-4)
        shutil.rmtree(here / "alone.mem")
    assert names


def test_what_is_unchanged_is_not_written_again(model, kept, capsys, monkeypatch):
    before = tree(kept / "memories")
    with monkeypatch.context() as patch:
        patch.setattr(ParametricMemory, "write", lambda *_, **__: pytest.fail("nothing is written"))
        assert memorize(model) == 0
    out, err = capsys.readouterr()
    assert out.count("unchanged, not written again") == 4
    assert "4 unchanged" in err
    (kept / "notes" / "a.md").write_text("w01 w02 w03")
    (kept / "notes" / "new.md").write_text("w05 w02 w03")
    assert memorize(model) == 2
    assert "output: 'memories/a.mem' holds a memory already, of another text" in capsys.readouterr().err
    assert tree(kept / "memories") == before, "nothing was written, the new one neither"
    assert memorize(model, "--overwrite") == 0
    out, err = capsys.readouterr()
    assert "2 written" in err
    assert "3 unchanged" in err
    assert read_memory(kept / "memories" / "a.mem").provenance["tokens"] == 3
    assert {name: what for name, what in tree(kept / "memories").items() if name.startswith("b.mem")} == {
        name: what for name, what in before.items() if name.startswith("b.mem")
    }


@pytest.mark.parametrize("more", [["--seed", "1"], ["--mem_inner_lr", "0.3"], ["--gate", "written"]])
def test_another_option_is_a_change(more, model, kept, capsys):
    flags = [*FLAGS, *more] if more[0] != "--mem_inner_lr" else [*FLAGS[:-2], *more]
    assert main(["memorize", "--model", model, "--file", "notes", "--output", "memories", *flags]) == 2
    assert "'memories/a.mem', 'memories/b.mem', 'memories/deep-c.mem' and 1 more" in capsys.readouterr().err


def test_several_files_and_one_memory_of_all(model, here, capsys):
    files = ["--file", "notes/a.md", "notes/b.txt", "--file", "notes/deep"]
    assert memorize(model, *files) == 0
    assert sorted(path.name for path in (here / "memories").iterdir()) == ["a.mem", "b.mem", "c.mem"]
    assert memorize(model, "--file", "notes/long.txt") == 0, "into the folder that holds the others"
    assert (here / "memories" / "long.mem").is_dir()
    assert memorize(model, *files, "--joined", output="all.mem") == 0
    facts = read_memory("all.mem").provenance
    assert facts["tokens"] == 9 + 30 + 21
    assert [source["source"] for source in facts["sources"]] == [
        str(here / "notes" / name) for name in ("a.md", "b.txt", "deep/c.md")
    ]
    capsys.readouterr()
    assert memorize(model, *files, "--joined", output="all.mem") == 0
    assert "unchanged" in capsys.readouterr().out
    shown = ["--keep_context", "--max_new_tokens", "3", "w02"]
    assert main(["ask", "--model", model, "--memory", "all.mem", *shown]) == 0
    answer = capsys.readouterr().out
    joined = "\n\n".join((here / "notes" / name).read_text() for name in ("a.md", "b.txt", "deep/c.md"))
    assert main(["ask", "--model", model, "--memory", "all.mem", "--max_new_tokens", "3", f"{joined}\n\nw02"]) == 0
    assert capsys.readouterr().out == answer


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--file", "notes/a.md", "notes/a.md"], "is named twice"),
        (["--file", "notes/a.md", "a.md"], "two documents would both become 'memories/a.mem'"),
        (["--file", "empty"], "the folder 'empty' holds no documents"),
        (["--file", "notes", "none.txt"], "'none.txt' does not exist"),
        (["--file", "notes/a.md", "--joined"], "joined has no effect on one document"),
        (["--file", "notes", "--output", "one.mem"], "is a memory; 4 documents need a folder"),
        (["--file", "notes", "--output", "a.md"], "is a file; name a folder"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_model_is_loaded(more, message, model, here, capsys):
    assert memorize(model, "--file", "notes/a.md", output="one.mem") == 0
    (here / "empty").mkdir()
    (here / "a.md").write_text("w01")
    before = tree(here)
    capsys.readouterr()
    output = [] if "--output" in more else ["--output", "memories"]
    assert main(["memorize", "--model", "none", *more, *output]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1 + err.count("left out:")
    assert tree(here) == before


def test_memories_are_listed_shown_renamed_and_deleted(model, kept, capsys):
    assert main(["memory"]) == 0
    listed = rows(capsys.readouterr().out)
    assert [(row[0], row[1], row[2]) for row in listed] == [
        ("memories/a.mem", "a.md", "9"),
        ("memories/b.mem", "b.txt", "30"),
        ("memories/deep-c.mem", "c.md", "21"),
        ("memories/long.mem", "long.txt", "60"),
    ]
    assert main(["memory", "list", "memories", "--json"]) == 0
    assert [each["provenance"]["tokens"] for each in json.loads(capsys.readouterr().out)] == [9, 30, 21, 60]
    assert main(["memory", "show", "memories/a.mem"]) == 0
    assert "source_sha256" in capsys.readouterr().out
    before = tree(kept / "memories" / "a.mem")
    assert main(["memory", "rename", "memories/a.mem", "first.mem"]) == 0
    assert tree(kept / "first.mem") == before
    assert not (kept / "memories" / "a.mem").exists()
    for new, message in (
        ("memories/b.mem", "holds a memory already"),
        ("first.mem", "is the name that it has"),
        ("notes", "memdlm did not write"),
        ("first.mem/x", "lies in the memory itself"),
    ):
        assert main(["memory", "rename", "first.mem", new]) == 2
        assert message in capsys.readouterr().err
    assert main(["memory", "rm", "first.mem", "memories/b.men"]) == 2
    assert "Did you mean 'b.mem'?" in capsys.readouterr().err
    assert (kept / "first.mem").is_dir(), "nothing is deleted where one is missing"
    (kept / "memories" / "b.mem" / "mine.txt").write_text("x")
    assert main(["memory", "rm", "memories/b.mem"]) == 2
    assert main(["memory", "rm", "notes"]) == 2
    assert main(["memory", "rm", "first.mem"]) == 0
    assert not (kept / "first.mem").exists()
    assert (kept / "memories" / "b.mem" / "mine.txt").read_text() == "x"
    assert main(["memory", "remove", "x"]) == 2
    assert "Possible: list, show, rename, combine, compress" in capsys.readouterr().err
    assert main(["memory", "list", "notes"]) == 0
    assert "no memories in notes. memdlm memorize" in capsys.readouterr().out


def test_a_damaged_memory_is_listed_and_can_be_deleted(kept, capsys):
    weights = kept / "memories" / "a.mem" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert main(["memory", "list"]) == 0
    assert "memories/a.mem        unreadable: memdlm memory show says why" in capsys.readouterr().out
    assert main(["memory", "show", "memories/a.mem"]) == 2
    assert "memory 'memories/a.mem': " in capsys.readouterr().err
    assert main(["memory", "rm", "memories/a.mem"]) == 0


def test_compressing_says_what_it_lost(kept, capsys):
    assert main(["memory", "compress", "memories/b.mem", "--rank", "1", "--output", "small.mem"]) == 0
    assert "small.mem: rank 4 -> 1" in capsys.readouterr().out
    assert read_memory("small.mem").rank == 1
    assert main(["memory", "compress", "memories/b.mem", "--rank", "4", "--output", "other.mem"]) == 2
    assert "rank must be from 1 to 3" in capsys.readouterr().err
    assert not (kept / "other.mem").exists()


def test_combining_measures_what_the_parts_lose_and_warns(model, kept, capsys, monkeypatch):
    assert main(["memory", "combine", "memories", "--output", "all.mem", "--weights", "1", "1", "1", "-3"]) == 0
    out, err = capsys.readouterr()
    found = read_memory("all.mem")
    assert found.rank == 16
    network, tokenizer = load_model(model), load_tokenizer(model)
    measured = {each["name"]: Interference(**each) for each in found.provenance["interference"]}
    assert list(measured) == [f"memories/{name}.mem" for name in ("a", "b", "deep-c", "long")]
    table = {row[0]: row[1:4] for row in rows(out)[1:]}
    for name, each in measured.items():
        assert table[name] == [f"{value:.3f}" for value in (each.without, each.own, each.combined)]
        assert (f"warning: {name}: the loss on its text is {each.cost:.3f} nats" in err) == (each.cost > 0)
    long = measured["memories/long.mem"]
    assert long.combined > long.without, "it was subtracted"
    assert f"It is no better than without a memory ({long.without:.3f})" in err
    own = read_memory("memories/b.mem")
    memory = ParametricMemory(network, own.reading_config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    memory.check_fits(own)

    (kept / "notes" / "a.md").write_text("w01")
    (kept / "notes" / "b.txt").unlink()
    parts = ["memories/a.mem", "memories/b.mem"]
    assert main(["memory", "combine", *parts, "--output", "two.mem", "--how", "average"]) == 0
    out, err = capsys.readouterr()
    assert "warning: memories/a.mem: what it loses was not measured" in err
    assert "was changed since it was memorised" in err
    assert "b.txt' does not exist" in err
    assert read_memory("two.mem").provenance["interference"] == []
    monkeypatch.setattr(combining, "load_parts", lambda *_: pytest.fail("no model is needed"))
    assert main(["memory", "combine", *parts, "--output", "three.mem", "--measure", "False"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["memories/a.mem"], "at least 2 memories, got 1"),
        (["memories", "memories/a.mem"], "is named twice"),
        (["memories", "--weights", "1"], "there are 1 for 4 memories"),
        (["memories", "--how", "average", "--weights", "1"], "weights has no effect with how='average'"),
        (["memories", "--measure", "False", "--model", "x"], "model has no effect with measure=False"),
        (["memories", "--model", "none"], "none"),
        (["nowhere"], "there is no such folder"),
    ],
)
def test_combining_refuses_in_one_line(more, message, kept, capsys):
    assert main(["memory", "combine", *more, "--output", "all.mem"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert not (kept / "all.mem").exists()


def answers(out):
    lines = out.splitlines()
    return [(lines[place], lines[place + 1]) for place in range(0, len(lines), 2)]


def test_of_several_memories_the_one_with_the_likeliest_answer_answers(model, kept, capsys):
    paths = ["memories/a.mem", "memories/b.mem", "memories/deep-c.mem"]
    # Answers of words alone, so that they can be read back from their texts.
    flags = ["--model", model, "--max_new_tokens", "3", "--chat", "False", "--suppress_tokens", *"01234"]
    questions = ["w02 w09", "w11", "w30 w07 w01"]
    alone = {}
    for path in paths:
        assert main(["ask", *flags, "--memory", path, "--", *questions]) == 0
        alone[path] = capsys.readouterr().out.splitlines()
    (kept / "questions.jsonl").write_text("".join(json.dumps({"question": each}) + "\n" for each in questions))
    named = [word for path in paths for word in ("--memory", path)]
    assert main(["ask", *flags, *named, "--questions", "questions.jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    network, tokenizer = load_model(model), load_tokenizer(model)
    for number, (question, row) in enumerate(zip(questions, found, strict=True)):
        assert row["memory"] == min(row["nats"], key=row["nats"].get)
        assert row["response"] == alone[row["memory"]][number]
        for path in paths:
            own = read_memory(path)
            memory = ParametricMemory(network, own.reading_config, mask_token_id=tokenizer.mask_token_id)
            answer = torch.tensor(tokenizer(alone[path][number])["input_ids"])
            prompt = torch.tensor(tokenizer(question)["input_ids"])
            with memory.recall(own):
                nats = score(
                    network,
                    prompt,
                    answer,
                    num_samples=asking.SAMPLES,
                    batch_size=asking.SAMPLES,
                    mask_token_id=tokenizer.mask_token_id,
                    generator=derive("memdlm ask likelihood", 0, number),
                )
            assert row["nats"][path] == pytest.approx(float(nats) / 3, rel=1e-4)
    assert main(["ask", *flags, *named, "--", *questions]) == 0
    for row, (text, said) in zip(found, answers(capsys.readouterr().out), strict=True):
        assert text == row["response"]
        assert said.startswith(f"  ({row['memory']}: {row['nats'][row['memory']]:.2f} nats per token; ")
    assert main(["ask", *flags, "--memory", "memories", "w01"]) == 0, "a folder stands for its memories"
    assert capsys.readouterr().out.count(".mem") == 4


def test_generate_and_infill_read_a_saved_memory(model, kept, capsys):
    flags = ["--model", model, "--memory", "memories/long.mem"]
    assert main(["generate", *flags, "--max_new_tokens", "3", "w02 w09"]) == 0
    read = capsys.readouterr().out
    assert main(["ask", *flags, "--max_new_tokens", "3", "--chat", "False", "w02 w09"]) == 0
    assert capsys.readouterr().out == read
    filled = []
    for more in ([], ["--memory", "memories/long.mem"]):
        words = ["infill", "--model", model, *more, "--blank", "_", "w01 _ _ _ w02 _ _"]
        assert main(words) == 0
        filled.append(capsys.readouterr().out)
    assert filled[0] != filled[1]


@pytest.mark.parametrize("command", ["generate", "infill", "chat"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--memory"], "--memory takes the folder of a saved memory. To write each prompt into memory, as"),
        (["--memory", "--seed", "1"], "add --mem_enabled True"),
        (["--memory", "w01 w02"], "memory 'w01 w02': there is no such folder. To write each prompt"),
        (["--memory", "memories"], "this folder is no memory. It holds memories/a.mem,"),
        (["--memory", "memories/a.men"], "Did you mean 'a.mem'?"),
        (["--memory", "memories/a.mem", "--mem_enabled"], "exclude each other"),
    ],
)
def test_the_old_switch_says_what_took_its_place(command, more, message, model, kept, capsys):
    prompt = [] if command == "chat" else ["w01"]
    assert main([command, *prompt, "--model", model, *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_chat_shows_loads_and_unloads_memories(model, kept, capsys, monkeypatch):
    def talk(*lines, more=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert main(["chat", "--model", model, "--max_new_tokens", "3", *more]) == 0
        return capsys.readouterr().out.splitlines()[:-1]

    def alone(path):
        return talk("w02 w09", more=["--memory", path])[0]

    (bare,) = talk("w02 w09")
    found = talk(
        *("/memory", "/memory memories/long.mem", "w02 w09", "/memory", "/new"),
        *("/memory memories/b.mem", "w02 w09", "/new", "/memory off", "w02 w09", "/memory nowhere", "/memory on"),
        *("/memory", "/memory memories/a.mem", "/memory"),
    )
    reading = "(reading memories/{}.mem: {} tokens, written from {}; /memory off unloads it)"
    assert found == [
        "(memory is off; /memory FOLDER reads a saved one)",
        reading.format("long", 60, "long.txt"),
        alone("memories/long.mem"),
        reading.format("long", 60, "long.txt"),
        "(new conversation)",
        reading.format("b", 30, "b.txt"),
        alone("memories/b.mem"),
        "(new conversation)",
        "(memory is off)",
        bare,
        "(error: memory 'nowhere': there is no such folder.)",
        "(memory is on: the history is written before each answer)",
        "(memory is on: the history is written before each answer; /memory FOLDER reads a saved one)",
        reading.format("a", 9, "a.md"),
        reading.format("a", 9, "a.md"),
    ]


def test_a_chat_that_keeps_prompts_answers_as_one_that_does_not(here, capsys, monkeypatch):
    """The prompt cache holds what no memory changes: with memories of more and of fewer blocks, and with none."""
    model = saved("llada2", here / "model")
    for name, share in (("half", "0.5"), ("most", "0.9")):
        flags = ["--mem_inner_layer_fraction", share, "--mem_inner_lr", "0.5", "--mem_inner_rank", "4"]
        words = ["--model", model, "--file", "notes/b.txt", "--output", f"{name}.mem"]
        assert main(["memorize", *words, *flags]) == 0
    long = text(3, 18)
    switches = ["/memory half.mem", "/memory most.mem", "/memory off", "/memory most.mem", "/memory on"]
    lines = [word for switch in switches for word in (long, switch, "/new")]
    outs = []
    for more in ([], ["--cache", "none"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, long]) + "\n"))
        capsys.readouterr()
        assert main(["chat", "--model", model, "--max_new_tokens", "8", "--block_size", "4", *more]) == 0
        outs.append(capsys.readouterr().out.splitlines()[:-1])
    assert outs[0] == outs[1]
