"""The preprocessing cache: the rows of on-the-spot encoding, found by name, refused when anything differs."""

import json

import pytest

from memdlm.data import EncodingOptions, fit, load_conversations
from memdlm.data.encoding import COLUMNS, encode_all
from memdlm.data.manifest import MANIFEST, SUMS, read_manifest
from memdlm.data.preprocess import load_preprocessed, preprocess
from memdlm.errors import ConfigError, DataError
from memdlm.types import IGNORE_INDEX


@pytest.fixture(autouse=True)
def _own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [{"prompt": f"w{n % 5} w1", "response": " ".join(["w2"] * (1 + n % 7))} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write(source, tokenizer, out, options=None, **more):
    options = EncodingOptions() if options is None else options
    return preprocess(load_conversations(source), source, tokenizer, options, out, **more)


def plain(rows):
    return [{name: row[name] for name in COLUMNS} for row in rows]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_folder_holds_what_encoding_on_the_spot_gives(num_proc, source, word_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("memdlm.data.preprocess.PIECE", 6)
    args, options = f"{source}[train:15,test:5]", EncodingOptions()
    done = []
    manifest = write(args, word_tokenizer, tmp_path / "out", num_proc=num_proc, advance=done.append)
    found, manifests = load_preprocessed(args, word_tokenizer, options, tmp_path / "nowhere")
    for split, conversations in load_conversations(args).items():
        assert plain(found[split]) == plain(encode_all(conversations, word_tokenizer, options))
        lengths = found[split]["length"][:]
        assert manifest["splits"][split]["tokens"] == sum(lengths)
        assert sum(manifest["splits"][split]["lengths_up_to"].values()) == len(lengths)
    assert manifests == {str(tmp_path / "out"): manifest}
    assert done[-1] == 20
    assert not list(tmp_path.glob(".out*"))


def test_an_interrupted_job_goes_on_where_it_stopped(source, word_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("memdlm.data.preprocess.PIECE", 4)
    whole = write(source, word_tokenizer, tmp_path / "whole")

    def stop(done):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, word_tokenizer, tmp_path / "out", advance=stop)
    assert not (tmp_path / "out").exists()
    done = []
    again = write(source, word_tokenizer, tmp_path / "out", advance=done.append)
    assert {**again, SUMS: None} == {**whole, SUMS: None}
    arrow = "train/data-00000-of-00001.arrow"
    assert again[SUMS][arrow] == whole[SUMS][arrow]
    assert done == [12, 16, 20]


def test_a_finished_folder_is_left_alone_and_another_is_not_overwritten(source, word_tokenizer, tmp_path):
    out = tmp_path / "out"
    first = write(source, word_tokenizer, out)
    stamp = (out / MANIFEST).stat().st_mtime_ns
    assert write(source, word_tokenizer, out) == first
    assert (out / MANIFEST).stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="train_turns: made with last, wanted all"):
        write(source, word_tokenizer, out, EncodingOptions(train_turns="all"))
    assert write(source, word_tokenizer, out, EncodingOptions(train_turns="all"), overwrite=True) != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match=r"did not write thesis\.txt there as part of preprocessed data"):
        write(source, word_tokenizer, tmp_path / "mine", overwrite=True)


@pytest.mark.parametrize("named", ["dataset", "folder", "folder with limits"])
def test_training_finds_the_folder_by_the_name_of_its_data_or_by_its_own(named, source, word_tokenizer, tmp_path):
    out = tmp_path / "deep" / "out"
    write(source, word_tokenizer, out)
    args = {"dataset": source, "folder": str(out), "folder with limits": f"{out}[train:12,test:8]"}[named]
    found, _ = load_preprocessed(args, word_tokenizer, EncodingOptions(), tmp_path)
    assert sum(map(len, found.values())) == 20
    if named == "folder with limits":
        assert {split: len(rows) for split, rows in found.items()} == {"train": 12, "test": 8}


def test_several_folders_mix(source, word_tokenizer, tmp_path):
    write(source, word_tokenizer, tmp_path / "a")
    write(f"{source}[train:5]", word_tokenizer, tmp_path / "b")
    found, manifests = load_preprocessed(
        f"{tmp_path / 'a'}[train:3] + {tmp_path / 'b'}", word_tokenizer, EncodingOptions(), tmp_path
    )
    assert len(found["train"]) == 8
    assert len(manifests) == 2


def change_template(tokenizer, source):
    tokenizer.chat_template += " "


def change_vocabulary(tokenizer, source):
    tokenizer.add_tokens(["new"])


def change_data(tokenizer, source):
    with open(source, "a") as file:
        file.write('{"prompt": "w1", "response": "w2"}\n')


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (change_template, {}, "tokenizer chat_template"),
        (change_vocabulary, {}, "tokenizer vocabulary"),
        (change_data, {}, "the data has changed"),
        (None, {"mask_prompt_loss": False}, "mask_prompt_loss: made with True, wanted False"),
        (None, {"train_turns": "all"}, "train_turns: made with last, wanted all"),
    ],
)
def test_a_folder_that_was_made_otherwise_is_refused(change, options, message, source, word_tokenizer, tmp_path):
    write(source, word_tokenizer, tmp_path / "out")
    if change is not None:
        change(word_tokenizer, source)
    with pytest.raises(DataError, match=message):
        load_preprocessed(source, word_tokenizer, EncodingOptions(**options), tmp_path)


def test_what_was_never_preprocessed_is_refused_with_the_command(source, word_tokenizer, tmp_path):
    with pytest.raises(DataError, match="memdlm preprocess --model MODEL --dataset_args"):
        load_preprocessed(source, word_tokenizer, EncodingOptions(), tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        read_manifest(tmp_path / "broken")


# Which rows are used -------------------------------------------------------------------------------------------------


def rows_with(*sizes):
    """Rows of (prompt, answer) tokens."""
    return [
        {
            "input_ids": list(range(prompt + answer)),
            "labels": [IGNORE_INDEX] * prompt + list(range(prompt, prompt + answer)),
            "length": prompt + answer,
            "prompt_length": prompt,
        }
        for prompt, answer in sizes
    ]


def fitted(rows, max_length, truncation):
    lengths, prompts = ([row[name] for row in rows] for name in ("length", "prompt_length"))
    return fit(rows, lengths, prompts, max_length=max_length, truncation=truncation)


def test_filter_leaves_long_rows_out_and_right_keeps_their_start():
    rows = rows_with((2, 2), (2, 4), (4, 1), (5, 3), (0, 9), (3, 0))
    kept, counts = fitted(rows, 4, "filter")
    assert [row["input_ids"] for row in kept] == [[0, 1, 2, 3]]
    assert (counts.too_long, counts.without_target, counts.shortened, counts.kept) == (4, 1, 0, 1)
    kept, counts = fitted(rows, 4, "right")
    # A prompt that fills max_length leaves nothing to learn: such rows are dropped, not counted as learned.
    assert [row["labels"] for row in kept] == [[-100, -100, 2, 3]] * 2 + [[0, 1, 2, 3]]
    assert (counts.too_long, counts.without_target, counts.shortened, counts.kept) == (0, 3, 2, 3)
    assert kept.lengths == [4, 4, 4]
    assert all(any(label != IGNORE_INDEX for label in row["labels"]) for row in kept)
