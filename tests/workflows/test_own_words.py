"""Words that a tokenizer does not have are a warning in every command whose text a user writes."""

import io

import pytest

from memdlm.cli.main import main
from memdlm.data import build_word_tokenizer, write_jsonl
from memdlm.models import SmallDLMConfig, build_model

WORDS = [f"w{index}" for index in range(20)]


@pytest.fixture(scope="module", params=[False, True], ids=["unknown token", "spelled"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_word_tokenizer(WORDS, spells=request.param)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    build_model(SmallDLMConfig(vocab_size=len(tokenizer), **sizes), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def said(capsys, *argv):
    """The warnings of a command that succeeds."""
    assert main(list(argv)) == 0
    out, err = capsys.readouterr()
    return [line for line in (out + err).splitlines() if "warning: " in line and "tokenizer does not have" in line]


def test_a_document_and_its_questions(model, tmp_path, capsys):
    memory = str(tmp_path / "doc.mem")
    (tmp_path / "doc.txt").write_text("w1 w2 Hugo Otto " * 5)
    flags = ["--model", model, "--file", str(tmp_path / "doc.txt"), "--output", memory]
    (line,) = said(capsys, "memorize", *flags)
    assert f"document {str(tmp_path / 'doc.txt')!r}: 67 % of the letters" in line
    assert "(Hugo, Otto)" in line
    ask = ["ask", "--model", model, "--memory", memory, "--max_new_tokens", "2"]
    (line,) = said(capsys, *ask, "w1 Hugo", "w2", "w3 Hugo")
    assert "question: 67 %" in line, "a word is named once"
    write_jsonl(({"question": f"w1 {name}"} for name in ("Hugo", "w2", "Otto")), tmp_path / "questions.jsonl")
    (line,) = said(capsys, *ask, "--questions", str(tmp_path / "questions.jsonl"), "--batch_size", "1")
    assert "3 questions" in line
    assert said(capsys, *ask, "w1 w2") == []


def test_prompts_texts_and_messages(model, capsys, monkeypatch):
    flags = ["--model", model, "--max_new_tokens", "2"]
    for more in ([], ["--chat"]):
        (line,) = said(capsys, "generate", "w1", "w2 Hugo", *flags, *more)
        assert "prompts: 50 %" in line
    (line,) = said(capsys, "infill", "w1 _ Hugo", "--blank", "_", "--model", model)
    assert "(Hugo)" in line
    assert said(capsys, "infill", "w1 _ w2", "--blank", "_", "--model", model) == []
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 Hugo\nw2 Hugo\nw1\nOtto\n/exit\n"))
    first, second = said(capsys, "chat", *flags)
    assert "(Hugo)" in first
    assert "(Otto)" in second


def test_data(model, tmp_path, capsys):
    def row(word):
        return {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": word}], "text": "Otto"}

    write_jsonl((row("Hugo" if index % 2 else "w2") for index in range(300)), tmp_path / "rows.jsonl")
    given = ["--model", model, "--dataset_args", f"{tmp_path / 'rows.jsonl'}"]
    (line,) = said(capsys, "preprocess", *given, "--output_dir", str(tmp_path / "data"), "--context_column", "text")
    assert "train, 256 of 300 conversations: " in line
    assert "Hugo" in line
    assert "Otto" in line
    more = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--report_to", "none", "--use_cpu", "True"]
    (line,) = said(capsys, "train", *given, *more)
    assert "(Hugo)" in line
