"""`make gpu`: parts go on where they stopped and lose no row; one page compares cards. On the CPU, in tiny sizes."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
RUN = FOLDER / "run.py"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    added = [str(FOLDER), str(FOLDER.parent)]
    sys.path[:0] = added
    yield
    for each in added:
        sys.path.remove(each)


@pytest.fixture
def card():
    import card

    return card


def options(out, **more):
    given = {"device": "cpu", "quick": True, "force": False, "budget": 1e9, "jobs": None, "started": 0.0}
    return Namespace(**{**given, "out": out, **more})


class Jobs(dict):
    """Jobs that say how often they ran; those in `broken` fail."""

    def __init__(self, *names, broken=()):
        self.ran, self.broken = [], set(broken)
        super().__init__({name: lambda name=name: self.run(name) for name in names})

    def run(self, name):
        self.ran.append(name)
        if name in self.broken:
            raise RuntimeError(f"{name} is broken")
        return {"figure": len(self.ran)}


def record(out):
    return json.loads((out / "cpu" / "part.json").read_text())


def test_a_row_that_is_there_is_not_measured_again(card, tmp_path):
    jobs = Jobs("one", "two")
    assert card.run_part("part", jobs, options(tmp_path, jobs=["two"])) == 0
    assert not record(tmp_path)["complete"]
    assert card.run_part("part", jobs, options(tmp_path)) == 0
    assert jobs.ran == ["two", "one"]
    assert [(name, row["figure"]) for name, row in record(tmp_path)["rows"].items()] == [("one", 2), ("two", 1)]
    assert record(tmp_path)["complete"]
    card.run_part("part", jobs, options(tmp_path, force=True))
    assert jobs.ran == ["two", "one", "one", "two"]


def test_a_job_that_fails_is_a_row_and_is_tried_again(card, tmp_path):
    jobs = Jobs("one", "two", "three", broken=["two"])
    assert card.run_part("part", jobs, options(tmp_path)) == 1
    rows = record(tmp_path)["rows"]
    assert rows["two"]["failed"] == "RuntimeError: two is broken"
    assert "figure" in rows["three"]
    assert not record(tmp_path)["complete"]
    jobs.broken.clear()
    assert card.run_part("part", jobs, options(tmp_path)) == 0
    assert jobs.ran == ["one", "two", "three", "two"]
    assert record(tmp_path)["complete"]


def test_what_was_measured_before_an_end_is_kept(card, tmp_path):
    """Every row is written at once: a part that is killed loses the row it was at."""

    class Killed(BaseException):
        pass

    def killed():
        raise Killed

    jobs = Jobs("one")
    with pytest.raises(Killed):
        card.run_part("part", {**jobs, "two": killed}, options(tmp_path))
    assert list(record(tmp_path)["rows"]) == ["one"]


def test_no_job_starts_when_the_seconds_are_used_up(card, tmp_path, capsys):
    jobs = Jobs("one")
    assert card.run_part("part", jobs, options(tmp_path, budget=-1.0)) == 0
    assert jobs.ran == []
    assert not record(tmp_path)["complete"]
    assert "call it again to go on" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("torch", "1.0"), ("driver", "0"), ("card", "another")])
def test_rows_of_another_machine_are_not_mixed_with_new_ones(key, value, card, tmp_path):
    jobs = Jobs("one", "two")
    card.run_part("part", jobs, options(tmp_path, jobs=["one"]))
    old = record(tmp_path)
    old["machine"][key] = value
    (tmp_path / "cpu" / "part.json").write_text(json.dumps(old))
    with pytest.raises(SystemExit, match=rf"{key} '{value}'.*--force"):
        card.run_part("part", jobs, options(tmp_path))
    assert record(tmp_path) == old


def test_an_unknown_job_is_refused(card, tmp_path):
    with pytest.raises(SystemExit, match="no jobs called three; there are one, two"):
        card.run_part("part", Jobs("one", "two"), options(tmp_path, jobs=["three"]))


# Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lladamoe", "llada2"])
def test_a_network_is_as_deep_as_fits_and_no_deeper_than_published(family):
    import shapes

    make = shapes.TRUE[family]
    depth = make().num_hidden_layers
    fits = lambda parameters: shapes.layers_that_fit(make, depth, parameters)
    with torch.device("meta"):
        size = lambda layers: shapes._count(shapes.build_model(make(num_hidden_layers=layers), seed=0))
        five, whole = size(5), size(depth)
    assert fits(five) == 5
    assert fits(five - 1) == 4
    assert fits(whole) == fits(1e15) == depth
    assert fits(0) == 2


# The page ---------------------------------------------------------------------------------------------------------


def put(folder, part, rows, is_quick=False):
    machine = {"driver": "1", "torch": "2", "date": "today", "commit": "abc"}
    folder.mkdir(exist_ok=True)
    content = {"part": part, "is_quick": is_quick, "machine": machine, "rows": rows, "complete": True}
    (folder / f"{part}.json").write_text(json.dumps(content))


def test_the_page_compares_all_cards(tmp_path):
    import page

    put(tmp_path / "A", "peaks", {"product": {"flop_per_s": 5e14}, "copy": {"bytes_per_s": 3e12}})
    put(tmp_path / "B", "peaks", {"product": {"failed": "RuntimeError: <b>no</b>"}})
    made = page.write(tmp_path).read_text()
    assert "<th>A</th><th>B</th>" in made
    assert "<td>500 TFLOP/s</td>" in made
    assert "<td>3000 GB/s</td><td>not measured</td>" in made
    assert '<td class="bad">failed: RuntimeError: &lt;b&gt;no' in made
    assert "nothing here is a result" not in made
    put(tmp_path / "B", "tests", {"a": {"passed": 3, "skipped": {"x": "y"}}}, is_quick=True)
    made = page.write(tmp_path).read_text()
    assert "nothing here is a result" in made
    assert "3 passed, 1 skipped" in made


def test_the_page_of_no_cards_says_what_to_do(tmp_path):
    import page

    assert "make gpu" in page.write(tmp_path).read_text()


# Whole parts ------------------------------------------------------------------------------------------------------


def started(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(RUN), *words], capture_output=True, text=True, env=environment)


def ended(out, *parts):
    done = started(*parts, "--device", "cpu", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    for part in parts:
        content = json.loads((out / "cpu" / f"{part}.json").read_text())
        assert content["complete"]
        assert content["is_quick"]
        assert content["rows"]
        assert all(row["took_s"] >= 0 for row in content["rows"].values())
    return done.stdout


@pytest.mark.slow
def test_a_part_runs_from_beginning_to_end_and_no_second_time(tmp_path):
    ended(tmp_path, "writes")
    rows = json.loads((tmp_path / "cpu" / "writes.json").read_text())["rows"]
    for row in rows.values():
        assert row["share_of_peak"] == row["flop"] / row["median_s"] / row["peak_flop_per_s"]
    assert "% of the peak" in (tmp_path / "page.html").read_text()
    assert "complete already" in ended(tmp_path, "writes")


@pytest.mark.slow
def test_the_long_parts_run_too(tmp_path):
    ended(tmp_path, "peaks", "writes", "profile", "steps", "decoding", "study")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "torch sees no GPU"),
        (("speed",), "no parts called speed; there are tests, peaks"),
        (("--jobs", "x"), "name it"),
        (("--device", "cpu", "--quick"), "--quick gives no results"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, said, monkeypatch, capsys):
    import run as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
