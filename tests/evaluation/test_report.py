"""The report says what was measured, nothing that was not, and never harms an earlier one."""

import copy
import json
import math
import os
import pickle
import re

import pytest

from memdlm.errors import DataError
from memdlm.report import summary_rows, write_report
from memdlm.report.pages import RECALL

LENGTHS = (32, 64, 128)
FILES = {"report.json", "accuracy_by_length.png", "training_curves.png", "exposure_bias.png", "report.html"}
LISTS = ("seeds", "notes", "models", "accuracy", "exposure_bias")
# model -> memory -> per length, the accuracies of seeds 0 and 1
ACCURACY = {
    "mdlm": {
        False: ((0.995, 0.985), (0.9525, 0.9375), (0.5, 0.375)),
        True: ((0.99, 0.98), (0.8275, 0.85), (0.25, 0.3125)),
    },
    "memdlm": {
        False: ((0.0425, 0.035), (0.04, 0.045), (0.0375, 0.05)),
        True: ((1.0, 0.975), (0.9825, 0.96), (0.88, 0.845)),
    },
}


def fake_model(model, seed):
    steps = list(range(0, 301, 25))
    rate = 0.012 if model == "mdlm" else 0.006
    falling = [3.2 * math.exp(-rate * step) + 0.05 + 0.15 * seed for step in steps]
    return {
        "model": model,
        "seed": seed,
        "parameters": 61_248,
        "steps": 300,
        "seconds": 18.5 + seed if model == "mdlm" else 34.25 + seed,
        "config": {"width": 48, "layers": 2, "lr": 0.002},
        "curve": {
            "step": steps,
            "loss": [value * 1.1 for value in falling],
            "eval_step": steps,
            "eval_nll": falling,
            "eval_nll_memory": [0.6 * value for value in falling] if model == "memdlm" else [],
        },
    }


def fake_bias(model, seed, memory):
    steps = list(range(1, 15))
    static = [0.7 / (1 + 0.1 * step) + (0.8 if memory else 0.0) for step in steps]
    grow = (0.25 if model == "mdlm" else 0.05) * (0.6 if memory else 1.0)
    sequential = [value * (1 + grow * step + 0.04 * seed) for step, value in zip(steps, static, strict=True)]
    return {
        "model": model,
        "seed": seed,
        "memory": memory,
        "step": steps,
        "static": static,
        "sequential": sequential,
        "matched": [value / (1.02 + 0.01 * step) for step, value in zip(steps, sequential, strict=True)],
    }


def fake_report():
    both = [(model, seed) for model in ACCURACY for seed in (0, 1)]
    return {
        "title": "Parametric memory as the only channel",
        "version": "0.1.0",
        "date": "2025-11-24",
        "command": "memdlm demo --seeds 0 1 --output demo <here>",
        "seeds": [0, 1],
        "quick": True,
        "notes": [
            "Both models are small and see at most 32 tokens in training.",
            "This shows that memory can carry a fact; it does not show that memory helps a large model.",
        ],
        "machine": {"cores": 2, "torch": "2.11.0", "python": "3.11.7", "system": "Linux"},
        "seconds": {"total": 192.0, "train": 107.5, "evaluate": 80.0},
        "task": {
            "name": "key-value recall",
            "description": "Read pairs of a key and a value; name the value of one key.",
            "chance": 1 / 24,
            "train_length": 32,
            "lengths": list(LENGTHS),
            "num_questions": 400,
        },
        "models": [fake_model(model, seed) for model, seed in both],
        "accuracy": [
            {
                "model": model,
                "seed": seed,
                "memory": memory,
                "length": length,
                "accuracy": ACCURACY[model][memory][index][seed],
                "questions": 400,
            }
            for model, seed in both
            for memory in (False, True)
            for index, length in enumerate(LENGTHS)
        ],
        "exposure_bias": [fake_bias(model, seed, memory) for model, seed in both for memory in (False, True)],
    }


def fake_panel():
    def model(name, seed):
        row = {"model": name, "seed": seed, "parameters": 5, "steps": 2, "seconds": 1.5, "config": {}}
        with_memory = [] if name == "MDLM" else [2.0, 0.25]
        row["curve"] = {"step": [1, 2], "loss": [2.0, 1.5], "nll": [2.0, 6.5], "nll_memory": with_memory}
        if name == "ours":
            words = ["fact", "k1", "<v2>"]
            row["written"] = {
                "words": words, "before": [1.0, 3.0, 8.0], "after": [1.0, 2.0, 0.5], "is_value": [False, False, True],
            }  # fmt: skip
        return row

    return {
        "task": {**fake_report()["task"], "name": "from memory", "lengths": [32]},
        "floor": 1.59,
        "leak": ["MDLM", "published"],
        "seeds": [0, 1],
        "models": [model(name, seed) for name in ("MDLM", "published", "ours") for seed in (0, 1)],
        "accuracy": [
            {"model": name, "seed": seed, "memory": memory, "length": 32, "accuracy": value, "questions": 40}
            for name, values in (("MDLM", (0.05, 0.025)), ("ours", (0.95, 0.25)))
            for seed, value in enumerate(values)
            for memory in (False, True)
        ],
        "exposure_bias": [],
    }


def text_of(folder):
    """The page's words: no style, no tags, single spaces."""
    page = re.sub(r"<style>.*?</style>", "", (folder / "report.html").read_text(), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("&plusmn;", "+-")


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "made" / "when needed"
    return folder, write_report(fake_report(), folder)


def test_every_file_is_written_and_nothing_else(written):
    folder, paths = written
    assert {path.name for path in paths} == FILES == {path.name for path in folder.iterdir()}
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "report.json").read_text()) == fake_report()


def test_the_page_shows_mean_and_half_range_of_both_seeds(written):
    words = text_of(written[0])
    for of_model in ACCURACY.values():
        for of_lengths in of_model.values():
            cells = [f"{50 * (a + b):.1f} +- {50 * abs(a - b):.1f}" for a, b in of_lengths]
            assert " ".join(cells) in words
    assert "Chance is 4.2 %" in words
    assert "32 1\N{MULTIPLICATION SIGN}" in words
    assert "128 4\N{MULTIPLICATION SIGN}" in words
    assert 'title="seed 0: 95.2; seed 1: 93.8"' in (written[0] / "report.html").read_text()


def test_the_page_tells_bias_cost_and_command(written):
    words = text_of(written[0])
    # mdlm, memory off: ratio 1 + 0.25 * 14 (+ 0.04 for seed 1), matched 1.02 + 0.01 * 14 for both.
    assert "mdlm off 4.52 +- 0.02 1.16 +- 0.00" in words
    assert "mdlm 61,248 300 19.0 +- 0.5" in words
    assert "3.2 minutes" in words
    assert "quick run" in words
    assert "memdlm demo --seeds 0 1 --output demo &lt;here&gt;" in words
    for note in fake_report()["notes"]:
        assert note in words
    assert "not measured" not in words


def test_the_sections_come_in_order(written):
    page = (written[0] / "report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Answer with the prompt in sight", "Training: loss by step",
        "Exposure bias: what errors of its own cost a model", "Cost: seconds and steps", "Configuration",
        "How to reproduce",
    ]  # fmt: skip
    assert page.count("<img ") == 5


def test_the_panel_of_recall_comes_first_with_every_seed(written, tmp_path):
    paths = write_report({**fake_report(), "recall": fake_panel()}, tmp_path)
    assert {path.name for path in paths} == FILES | {"recall_by_length.png", "recall_losses.png"}
    page, words = (tmp_path / "report.html").read_text(), text_of(tmp_path)
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [RECALL, *re.findall(r"<h2>(.*?)</h2>", (written[0] / "report.html").read_text())]
    assert "ours off 60.0 +- 35.0 95.0, 25.0" in words, "failures are in the table, seed by seed"
    assert "model \u201cours\u201d answers 60 % of the questions right from its memory, and 60 % with the" in words
    assert page.count('class="words"') == 2
    assert page.count("<details open>") == 1
    assert (
        "the values of the facts (in bold) lost 8.00 before, 0.50 after; the other words lost 2.00 before, 1.50 after"
        in words
    )
    assert "&lt;v2&gt;" in page
    assert "1.59 nats per token, is the lowest loss" in words


def test_an_empty_panel_says_so(tmp_path):
    panel = {**fake_panel(), "models": [], "accuracy": []}
    write_report({**fake_report(), "recall": panel}, tmp_path)
    assert text_of(tmp_path).count("not measured: interrupted") == 3


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("floor", "low", r"report\.recall\.floor must be a number"),
        ("accuracy", [3], r"report\.recall\.accuracy\[0\] must be an object"),
        ("models", [{**fake_panel()["models"][4], "written": {"words": ["a"]}}], r"written\.\w+ is missing"),
        ("models", [fake_panel()["models"][0]] * 2, r"recall\.models\[1\] repeats report\.recall\.models\[0\]"),
    ],
)  # fmt: skip
def test_a_wrong_panel_names_its_field(key, value, match, tmp_path):
    with pytest.raises(DataError, match=match):
        write_report({**fake_report(), "recall": {**fake_panel(), key: value}}, tmp_path)


def test_the_page_needs_no_other_file(written):
    page = (written[0] / "report.html").read_text()
    assert not re.search(r"https?://", page)
    assert "<script" not in page
    assert "<link" not in page
    assert "url(" not in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_the_same_report_gives_the_same_bytes(written, tmp_path):
    write_report(fake_report(), tmp_path)
    assert bytes_of(tmp_path) == bytes_of(written[0])


def test_summary_rows_are_the_table_as_data():
    rows = summary_rows(fake_report())
    assert [(row.model, row.memory) for row in rows] == [
        ("mdlm", False), ("mdlm", True), ("memdlm", False), ("memdlm", True),
    ]  # fmt: skip
    cell = rows[3].cells[2]
    assert cell.length == 128
    assert cell.mean == pytest.approx(0.8625)
    assert cell.spread == pytest.approx(0.0175)
    assert cell.values == [0.88, 0.845]


def test_three_seeds_have_a_standard_deviation_and_one_has_no_spread():
    report = fake_report()
    report["seeds"] = [0, 1, 2]
    row = {"model": "mdlm", "memory": False, "length": 32, "questions": 400}
    report["accuracy"] = [{**row, "seed": seed, "accuracy": value} for seed, value in enumerate((0.1, 0.2, 0.6))]
    report["accuracy"].append({**row, "seed": 0, "accuracy": 0.5, "length": 64})
    three, one, none = summary_rows(report)[0].cells
    assert three.spread == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert three.note == ""
    assert (one.spread, one.note) == (None, "1 of 3 seeds")
    assert (none.mean, none.note) == (None, "not measured")


def test_memory_without_a_baseline_is_refused(tmp_path):
    report = fake_report()
    report["accuracy"] = [
        row for row in report["accuracy"]
        if row["memory"] or not (row["model"] == "memdlm" and (row["length"] == 128 or row["seed"] == 1))
    ]  # fmt: skip
    report["exposure_bias"] = [row for row in report["exposure_bias"] if row["memory"] or row["model"] == "mdlm"]
    cells = summary_rows(report)[3].cells
    assert cells[0].values == [1.0]
    assert cells[0].note == "seed 1: no baseline"
    assert (cells[2].values, cells[2].mean, cells[2].note) == ([], None, "no baseline")

    write_report(report, tmp_path)
    words = text_of(tmp_path)
    assert "memdlm on 100.0 seed 1: no baseline 98.2 seed 1: no baseline no baseline" in words
    assert "memdlm on no baseline" in words.split("mean sequential")[1]  # exposure bias
    assert "memdlm off" not in words.split("mean sequential")[1], "empty rows are left out"
    assert "86.2" not in words


def test_nothing_but_refused_rows_draws_no_figure(tmp_path):
    report = fake_report()
    for name in ("accuracy", "exposure_bias"):
        report[name] = [row for row in report[name] if row["memory"]]
    write_report(report, tmp_path)
    words = text_of(tmp_path)
    assert "mdlm on no baseline no baseline no baseline memdlm on no baseline" in words
    assert "not measured: interrupted" not in words
    assert (tmp_path / "report.html").read_text().count("<img ") == 1  # training


@pytest.mark.parametrize("name", LISTS)
def test_an_empty_list_is_said_in_words(name, tmp_path):
    report = fake_report()
    report[name] = []
    assert {path.name for path in write_report(report, tmp_path)} == FILES
    has_words = "not measured: interrupted" in text_of(tmp_path)
    assert has_words == (name in ("models", "accuracy", "exposure_bias"))


def test_nothing_measured_at_all_is_still_a_report(tmp_path):
    report = {**fake_report(), **{name: [] for name in LISTS}}
    report["task"]["lengths"] = []
    write_report(report, tmp_path)
    assert text_of(tmp_path).count("not measured: interrupted") == 5
    assert summary_rows(report) == []


def test_an_interrupted_curve_and_a_loss_of_zero_do_no_harm(tmp_path):
    report = fake_report()
    curve = report["models"][3]["curve"]
    for name in curve:
        curve[name] = curve[name][:1]
    report["models"][0]["curve"] = {name: [] for name in curve}
    bias = report["exposure_bias"][0]
    for name in ("static", "matched"):
        bias[name] = [0.0] * len(bias[name])
    report["exposure_bias"][7]["sequential"][0] *= 100  # a ratio that needs the logarithmic scale
    report["exposure_bias"][1] |= {"step": [], "static": [], "sequential": [], "matched": []}
    write_report(report, tmp_path)
    words = text_of(tmp_path)
    assert "mdlm off 4.54 1 of 2 undefined 1.16 1 of 2 undefined" in words
    assert "mdlm on 3.14 1 of 2 seeds 1.16" in words


def test_names_are_shown_as_written(tmp_path):
    report = fake_report()
    report["models"], report["exposure_bias"] = [], []
    for row in report["accuracy"]:
        row["model"] = {"mdlm": "<b>a</b> & $x_1$", "memdlm": "_hidden"}[row["model"]]
    write_report(report, tmp_path)
    assert "&lt;b&gt;a&lt;/b&gt; &amp; $x_1$" in (tmp_path / "report.html").read_text()


def change(path, value):
    """Set the field at `path` of a fresh report; `...` removes it."""
    report = fake_report()
    *parents, last = path
    inner = report
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (["title"], ..., r"report\.title is missing"),
        (["title"], 3, r"report\.title must be a text, got 3"),
        (["quick"], "yes", r"report\.quick must be true or false"),
        (["machine"], [], r"report\.machine must be an object"),
        (["machine", "cores"], True, r"report\.machine\.cores must be a whole number, got True"),
        (["machine", "extra"], {1, 2}, r"report\.machine\.extra is of type set"),
        (["seconds", "train"], "1", r"report\.seconds\.train must be a number"),
        (["seconds", "train"], math.nan, r"report\.seconds\.train is nan"),
        (["task", "chance"], 4.2, r"report\.task\.chance must be between 0 and 1, got 4\.2"),
        (["task", "train_length"], 0, r"report\.task\.train_length must be at least 1"),
        (["task", "lengths", 1], 1.5, r"report\.task\.lengths\[1\] must be a whole number"),
        (["models"], {}, r"report\.models must be a list"),
        (["models", 1, "curve", "loss"], [1.0], r"report\.models\[1\]\.curve\.loss has 1 values for the 13"),
        (["models", 2, "curve", "eval_nll_memory"], [1.0], r"curve\.eval_nll_memory has 1 values"),
        (["models", 1, "config"], {"lr": math.inf}, r"report\.models\[1\]\.config\.lr is inf"),
        (["models", 1, "config"], {3: 4}, r"report\.models\[1\]\.config has the key 3"),
        (["models", 1, "seed"], 0, r"report\.models\[1\] repeats report\.models\[0\]: model 'mdlm', seed 0"),
        (["accuracy", 4, "accuracy"], 95.0, r"report\.accuracy\[4\]\.accuracy must be between 0 and 1"),
        (["accuracy", 4, "length"], 32, r"report\.accuracy\[4\] repeats report\.accuracy\[3\]"),
        (["exposure_bias", 0, "matched"], [], r"report\.exposure_bias\[0\]\.matched has 0 values for the 14"),
        (["exposure_bias", 0, "step"], None, r"report\.exposure_bias\[0\]\.step must be a list, got None"),
    ],
)  # fmt: skip
def test_a_wrong_shape_names_its_field_and_writes_nothing(path, value, match, tmp_path):
    report = change(path, value)
    with pytest.raises(DataError, match=match) as caught:
        write_report(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_report_that_is_no_mapping_is_refused(tmp_path):
    with pytest.raises(DataError, match="report must be an object"):
        write_report([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="lies under, a file"):
        write_report(fake_report(), tmp_path / "file" / "below")


@pytest.mark.parametrize("failing", ["report.json", "report.html"])
def test_an_earlier_report_survives_a_failing_write(failing, written, tmp_path, monkeypatch):
    before = bytes_of(written[0])
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    report = copy.deepcopy(fake_report())
    report["title"] = "Another"
    write_bytes = type(tmp_path).write_bytes

    def full_disk(path, content):
        if failing in path.name:
            write_bytes(path, content[: len(content) // 2])
            raise OSError("No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(type(tmp_path), "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(report, tmp_path)
    assert bytes_of(tmp_path) == before


def test_the_figures_ignore_the_users_matplotlib_settings(written, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9}):
        inside = dict(matplotlib.rcParams)
        write_report(fake_report(), tmp_path)
        assert dict(matplotlib.rcParams) == inside
    assert bytes_of(tmp_path) == bytes_of(written[0])
    assert os.listdir(tmp_path)
