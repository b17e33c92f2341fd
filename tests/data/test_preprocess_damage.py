"""Preprocessed data carry checksums, and what is damaged elsewhere stops nobody."""

import json
import os
import subprocess
import sys

import pytest

from memdlm.cli.main import main
from memdlm.data import EncodingOptions, load_conversations
from memdlm.data.manifest import MANIFEST, SUMS, index_folder
from memdlm.data.preprocess import load_preprocessed, preprocess
from memdlm.errors import ConfigError, DataError
from memdlm.outputs import MARKER
from trees import tree


@pytest.fixture(autouse=True)
def _own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [{"prompt": f"w{n % 5} w1", "response": " ".join(["w2"] * (1 + n % 7))} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def write(source, word_tokenizer):
    def run(out, options=None, **more):
        options = EncodingOptions() if options is None else options
        return preprocess(load_conversations(source), source, word_tokenizer, options, out, **more)

    return run


@pytest.fixture
def load(source, word_tokenizer, tmp_path):
    return lambda name=source: load_preprocessed(name, word_tokenizer, EncodingOptions(), tmp_path)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("named", ["dataset", "folder"])
@pytest.mark.parametrize("place", [0, 1, 0.3, 0.5, 0.7, -1])
def test_a_bit_flip_is_found(place, named, write, load, source, tmp_path, capsys):
    write(tmp_path / "out")
    arrow = tmp_path / "out" / "train" / "data-00000-of-00001.arrow"
    flip(arrow, int(place * arrow.stat().st_size) if isinstance(place, float) else place)
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow is damaged: its checksum.*with --overwrite"):
        load(source if named == "dataset" else str(tmp_path / "out"))
    with pytest.raises(DataError, match="is damaged"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert len(load()[0]["train"]) == 20


def test_a_missing_file_and_missing_checksums_are_found(write, load, tmp_path):
    manifest = write(tmp_path / "out")
    assert set(manifest[SUMS]) == {
        "dataset_dict.json",
        *(f"train/{name}" for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")),
    }
    (tmp_path / "out" / "train" / "state.json").rename(tmp_path / "state")
    with pytest.raises(DataError, match=r"state\.json is missing"):
        load()
    (tmp_path / "state").rename(tmp_path / "out" / "train" / "state.json")
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({**manifest, SUMS: {}}))
    with pytest.raises(DataError, match="it has no checksums"):
        load()


def test_a_folder_of_the_earlier_format_is_read_and_replaced_unless_it_holds_more(write, load, tmp_path):
    out = tmp_path / "out"
    manifest = write(out)
    earlier = json.dumps({name: value for name, value in {**manifest, "format": 1}.items() if name != SUMS})
    (out / MANIFEST).write_text(earlier)
    (out / MARKER).unlink()
    assert len(load()[0]["train"]) == 20
    before = tree(out)
    write(out)
    assert tree(out) == before, "what serves is left as it is"
    (out / "train" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="did not write train/notes"):
        write(out, overwrite=True)
    (out / "train" / "notes").unlink()
    assert write(out, overwrite=True)["format"] == 2


def of_another_program(folder):
    (folder / MANIFEST).write_text('{"name": "my app", "icons": []}')


def unreadable(folder):
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00{")


def a_folder(folder):
    (folder / MANIFEST).mkdir()


def a_link_to_nothing(folder):
    (folder / MANIFEST).symlink_to("nowhere")


def a_pipe(folder):
    os.mkfifo(folder / MANIFEST)


def cut_off(folder):
    (folder / MANIFEST).write_text('{"format": 2, "dataset_args"')


def of_other_shapes(folder):
    whole = {"format": 1, "dataset_args": "x", "tokenizer": {}, "options": {}, "splits": {}}
    for number, change in enumerate(({"sources": None}, {"sources": [1]}, {"format": 99}, {"options": []})):
        (folder / str(number)).mkdir()
        (folder / str(number) / MANIFEST).write_text(json.dumps({"sources": [], **whole, **change}))


@pytest.mark.parametrize(
    "damage", [of_another_program, unreadable, a_folder, a_link_to_nothing, a_pipe, cut_off, of_other_shapes]
)
def test_a_manifest_elsewhere_stops_nobody(damage, write, load, tmp_path):
    (tmp_path / "a" / "other").mkdir(parents=True)
    damage(tmp_path / "a" / "other")
    write(tmp_path / "out")
    assert len(load()[0]["train"]) == 20
    before = tree(tmp_path / "a")
    with pytest.raises(ConfigError, match="memdlm did not write"):
        write(tmp_path / "a" / "other", overwrite=True)
    assert tree(tmp_path / "a") == before


def test_a_damaged_note_stops_nobody_and_a_damaged_folder_is_named_when_none_serves(write, load, tmp_path):
    write(tmp_path / "out")
    notes = index_folder()
    for number, text in enumerate((b"\xff\xfe", b"", b"\x00", b"relative", b"/nowhere", b"x" * 9999)):
        (notes / f"note{number}").write_bytes(text)
    (notes / "folder").mkdir()
    (notes / "link").symlink_to("nowhere")
    assert len(load()[0]["train"]) == 20
    (tmp_path / "out" / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=r"Skipped: .*manifest\.json is damaged"):
        load()


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut_in_half, lambda path: path.write_bytes(b""), lambda path: flip(path, -100)])
def test_a_damaged_piece_of_an_interrupted_job_is_made_again(damage, write, load, tmp_path, monkeypatch):
    monkeypatch.setattr("memdlm.data.preprocess.PIECE", 4)
    whole = write(tmp_path / "whole")

    def stop(done):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", advance=stop)
    pieces = sorted((tmp_path / ".out.partial").rglob("*.arrow"))
    assert len(pieces) == 3
    damage(pieces[1])
    (pieces[0].parent / "mine.txt").write_text("mine")
    done = []
    again = write(tmp_path / "out", advance=done.append)
    assert done == [8, 12, 16, 20]
    arrow = "train/data-00000-of-00001.arrow"
    assert again[SUMS][arrow] == whole[SUMS][arrow]
    assert [path.name for path in (tmp_path / ".out.partial").rglob("*") if path.is_file()] == ["mine.txt"]


def test_two_at_once_are_refused_by_the_command(source, write, tmp_path, capsys):
    wait = (
        "import sys, time; from memdlm.outputs import output_folder; from memdlm.data.manifest import PREPROCESSED\n"
        "with output_folder(sys.argv[1], PREPROCESSED, overwrite=True): print('holding', flush=True); time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", wait, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "holding\n"
        with pytest.raises(ConfigError, match=f"is being written by process {first.pid}"):
            write(tmp_path / "out")
    finally:
        first.kill()
        first.wait()
    write(tmp_path / "out")
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "page.html")]) == 2
