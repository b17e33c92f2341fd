"""One way to replace an output: only ours goes, only when the new one is whole, and a kill in between is undone."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from memdlm import outputs
from memdlm.errors import ConfigError, DataError, MachineError, MemDLMError
from memdlm.outputs import MARKER, Kind, find, forbidden, output_file, output_folder
from trees import fill, tree

KIND, OTHER = Kind(name="thing", words="a thing"), Kind(name="other", words="another thing")


def put(place, text="1", kind=KIND, overwrite=True):
    with output_folder(place, kind, overwrite=overwrite) as output, output.replaced() as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").write_text(text)
    return place


def read(place):
    return (place / "deep" / "one").read_text()


def write_file(path, text=b"ours 2", **more):
    with output_file(path, lambda place: place.read_bytes().startswith(b"ours"), "page", **more) as write:
        write(text)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "a" / "result"
    with output_folder(place, KIND, overwrite=False) as output, output.replaced() as folder:
        (folder / "one").write_text("1")
        assert not place.exists()
    with pytest.raises(FileNotFoundError), output_folder(place, KIND, overwrite=True) as output:
        with output.replaced() as folder:
            (folder / "none" / "two").write_text("2")
    assert sorted(path.name for path in place.iterdir()) == [MARKER, "one"]
    with pytest.raises(ConfigError, match=r"holds a thing already.*name a new folder, or add --overwrite"):
        put(place, overwrite=False)
    put(place, "3")
    assert sorted(path.name for path in place.iterdir()) == [MARKER, "deep"]
    assert list(place.parent.iterdir()) == [place], "no lock and no piece is left"


@pytest.mark.parametrize("seed", range(20))
def test_somebodys_folder_is_refused_and_stays(seed, tmp_path):
    fill(tmp_path / "mine", seed)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="memdlm did not write"):
        put(tmp_path / "mine")
    assert tree(tmp_path) == before


def add_file(place):
    (place / "deep" / "notes").write_text("mine")


def add_folder(place):
    (place / "empty").mkdir()


def add_link(place):
    (place / "deep" / "one").unlink()
    (place / "deep" / "one").symlink_to(place.parent / "elsewhere")


def copy_marker(place):
    (place / "deep" / "one").rename(place / "deep" / "two")


@pytest.mark.parametrize("change", [add_file, add_folder, add_link, copy_marker])
def test_what_somebody_put_beside_ours_is_not_deleted(change, tmp_path):
    change(put(tmp_path / "doc"))
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="memdlm did not write"):
        put(tmp_path / "doc")
    assert tree(tmp_path) == before


def test_what_is_put_there_while_we_work_is_not_deleted(tmp_path):
    place = put(tmp_path / "doc")
    with output_folder(place, KIND, overwrite=True) as output:
        with pytest.raises(ConfigError, match="did not write late"), output.replaced():
            (place / "late").write_text("mine")
    assert read(place) == "1"
    assert (place / "late").read_text() == "mine"


def test_another_kind_of_ours_is_refused(tmp_path):
    put(tmp_path / "doc")
    with pytest.raises(ConfigError, match="as part of another thing"):
        put(tmp_path / "doc", kind=OTHER)
    assert read(tmp_path / "doc") == "1"


HOME, HERE, PREFIX = Path("/users/me"), Path("/users/me/work/here"), Path("/opt/python/3")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/", "is the root"),
        ("/users/me", "is the home folder"),
        ("/users", "holds the home folder"),
        ("/users/me/work/here", "is the working directory"),
        ("/users/me/work", "holds the working directory"),
        ("/opt/python", "holds a folder that this program runs from"),
        ("/opt/python/3", "is a folder that this program runs from"),
        ("/mnt", "is a folder of the system"),
        ("/users/me/work/here/out", None),
        ("/users/you", None),
        ("/mnt/disk", None),
    ],
)
def test_places_that_nobody_means_to_replace(place, reason):
    """`forbidden` looks nothing up and touches nothing: the root is named here, and nowhere else."""
    found = forbidden(Path(place), home=[HOME], here=HERE, running=[PREFIX])
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    "spelled", ["{0}", "{0}/", "{0}/.", "{0}/x/..", "{1}/link", ".", "..", "../..", "~", "~/", "$", "~/work/.."]
)
def test_home_here_and_their_parents_however_they_are_spelled(spelled, tmp_path, monkeypatch):
    home = tmp_path / "users" / "me"
    here = home / "work" / "here"
    here.mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    before = tree(tmp_path)
    name = "" if spelled == "$" else spelled.format(home, tmp_path)
    with pytest.raises(ConfigError, match="name a folder of its own"):
        put(name)
    assert tree(tmp_path) == before


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs.os.path, "ismount", lambda path: str(path).endswith("disk"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(ConfigError, match="is a mount point"):
        put(tmp_path / "disk")
    put(tmp_path / "disk" / "below")


def make_file(path):
    path.write_text("mine")


def make_socket(path):
    os.chdir(path.parent)  # names of sockets are short
    socket.socket(socket.AF_UNIX).bind(path.name)


@pytest.mark.parametrize(
    ("make", "words"), [(make_file, "is a file"), (os.mkfifo, "is a named pipe"), (make_socket, "is a socket")]
)
def test_what_is_no_folder_is_refused_as_one(make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=words):
        put(tmp_path / "out")
    with pytest.raises(DataError, match="is, or lies under, a file" if make is make_file else "neither|lies under"):
        put(tmp_path / "out" / "below")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "words"), [(os.mkdir, "is a folder"), (os.mkfifo, "is a named pipe"), (make_socket, "is a socket")]
)
def test_what_is_no_file_is_refused_as_one(make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=words):
        write_file(tmp_path / "out")
    with pytest.raises(DataError, match="is a device"):
        write_file("/dev/null")
    assert tree(tmp_path) == before


def test_a_link_is_followed_and_stays_also_one_to_nothing(tmp_path):
    for name in ("there", "nothing"):
        (tmp_path / f"{name}.link").symlink_to(tmp_path / name)
        (tmp_path / f"{name}.file").symlink_to(tmp_path / f"{name}.txt")
    put(tmp_path / "there")
    (tmp_path / "there.txt").write_text("ours 1")
    for name in ("there", "nothing"):
        put(tmp_path / f"{name}.link", "2")
        write_file(tmp_path / f"{name}.file")
        assert (tmp_path / f"{name}.link").is_symlink()
        assert (tmp_path / f"{name}.file").is_symlink()
        assert read(tmp_path / name) == "2"
        assert (tmp_path / f"{name}.txt").read_text() == "ours 2"
    (tmp_path / "loop").symlink_to("loop")
    for write in (put, write_file):
        with pytest.raises(MemDLMError, match=r"names no place|no valid name"):
            write(tmp_path / "loop")


def test_a_file_is_replaced_only_if_it_is_ours(tmp_path):
    page = tmp_path / "page"
    page.write_text("years of work")
    with pytest.raises(ConfigError, match="is no page that memdlm wrote"):
        write_file(page)
    assert page.read_text() == "years of work"
    page.write_text("ours 1")
    with pytest.raises(ConfigError, match="holds page already; name another file, or add --overwrite"):
        write_file(page, overwrite=False)
    write_file(page)
    assert page.read_text() == "ours 2"
    assert list(tmp_path.iterdir()) == [page]


# A process that was killed --------------------------------------------------------------------------------------------

WRITER = """
import os, signal, sys, time
from memdlm.outputs import Kind, output_folder
place, when = sys.argv[1:]
rename, calls = os.replace, []
def replace(source, target):
    calls.append(source)
    if when == "between" and len(calls) == 2 or when == "before" and len(calls) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
with output_folder(place, Kind(name="thing", words="a thing"), overwrite=True) as output, output.replaced() as folder:
    (folder / "new").write_text("")
    if when == "wait":
        print("holding", flush=True)
        time.sleep(600)
"""


def writer(place, when):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(place), when], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("use", ["write", "read"])
def test_a_kill_at_any_moment_leaves_the_earlier_result(when, use, tmp_path):
    place = put(tmp_path / "doc")
    assert writer(place, when).wait() == -signal.SIGKILL
    assert place.exists() == (when == "before")
    if use == "read":
        find(place, KIND)
    else:
        with pytest.raises(ConfigError, match="holds a thing already"):
            put(place, overwrite=False)
    assert read(place) == "1"
    put(place, "2")
    assert read(place) == "2"
    assert list(tmp_path.iterdir()) == [place], "what the dead process left is gone"


def test_what_only_looks_like_a_rest_of_ours_stays(tmp_path):
    place = put(tmp_path / "doc")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for suffix in ("old", "tmp"):
        fill(tmp_path / f".doc.{dead.pid}.{suffix}", 3)
    living = tmp_path / f".doc.{os.getppid()}.tmp"
    living.mkdir()
    outputs.mark(living, KIND)
    others = {key: value for key, value in tree(tmp_path).items() if not key.startswith("doc")}
    put(place, "2")
    assert {key: value for key, value in tree(tmp_path).items() if not key.startswith("doc")} == others


def test_a_deletion_that_was_cut_off_is_not_taken_for_a_result(tmp_path):
    place = put(tmp_path / "doc")
    half = put(tmp_path / "half")
    (half / "deep" / "one").unlink()
    half.rename(tmp_path / ".doc.999999.old")
    for path in (place / "deep" / "one", place / MARKER):
        path.unlink()
    (place / "deep").rmdir()
    place.rmdir()
    find(place, KIND)
    assert not place.exists()


def test_a_failing_rename_puts_the_earlier_result_back(tmp_path, monkeypatch):
    place, rename = put(tmp_path / "doc"), os.replace

    def replace(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(outputs.os, "replace", replace)
    with pytest.raises(MachineError, match="No space left on device"):
        put(place, "2")
    assert read(place) == "1"
    assert list(tmp_path.iterdir()) == [place]


# Two at once ----------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_while_the_first_lives_and_not_after_a_kill(tmp_path):
    place = put(tmp_path / "doc")
    first = writer(place, "wait")
    try:
        assert first.stdout.readline() == "holding\n"
        for _ in range(2):
            with pytest.raises(ConfigError, match=rf"is being written by process {first.pid} on "):
                put(place, "2")
        find(place, KIND)
        assert read(place) == "1"
    finally:
        first.kill()
        first.wait()
    put(place, "2")
    assert read(place) == "2"
    assert list(tmp_path.iterdir()) == [place]


def test_a_second_use_in_one_process_is_refused_and_forked_children_hold_nothing(tmp_path):
    with output_folder(tmp_path / "doc", KIND, overwrite=True):
        with pytest.raises(ConfigError, match=rf"by process {os.getpid()} on "):
            put(tmp_path / "doc")
    fork = f"""
import os, sys, time
from memdlm.outputs import Kind, output_folder
with output_folder({str(tmp_path / "doc")!r}, Kind(name="thing", words="a thing"), overwrite=True):
    if not os.fork():
        os.close(1)
        time.sleep(20)
    print("holding", flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", fork], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "holding\n"
    put(tmp_path / "doc")


def test_somebodys_file_of_the_name_of_a_lock_stays(tmp_path):
    (tmp_path / ".doc.lock").write_text("mine")
    with pytest.raises(ConfigError, match="is in the way"):
        put(tmp_path / "doc")
    assert (tmp_path / ".doc.lock").read_text() == "mine"


def test_the_marker_says_what_is_ours(tmp_path):
    found = json.loads((put(tmp_path / "doc") / MARKER).read_text())
    assert found == {"made_by": "memdlm", "kind": "thing", "entries": ["deep/", "deep/one"]}
