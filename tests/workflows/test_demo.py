"""The demo: same seed same figures, checkpoints that load, Ctrl-C keeps what is finished and harms nothing earlier."""

import dataclasses
import io
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from rich.console import Console

import memdlm.workflows.studies.demo as demo
from memdlm.cli.demo import _activation
from memdlm.cli.main import main
from memdlm.data import KeyValueRecall
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation import recall
from memdlm.memory import ParametricMemory
from memdlm.models import load_model, load_tokenizer
from memdlm.outputs import MARKER, output_folder
from memdlm.workflows.display import Display
from memdlm.workflows.studies import recall_study
from memdlm.workflows.studies.demo import DEMO, commands_to_try, run_demo
from memdlm.workflows.studies.demo_plan import PUBLISHED, READS, DemoPlan, plan_for
from memdlm.workflows.studies.plans import OURS, RecallPlan, open_book

PLAN = DemoPlan(
    seeds=(0, 1),
    open_book=open_book(
        task=KeyValueRecall(num_pairs=2, num_keys=4, num_values=4, num_questions=2),
        tokenizer=READS,
        train_length=8,
        num_train=24,
        num_eval=6,
        steps=12,
        batch_size=4,
        num_evals=2,
    ),
    recall=RecallPlan(
        task=KeyValueRecall(num_pairs=2, num_keys=4, num_values=4, num_questions=2, is_adjacent=True),
        tokenizer=READS,
        train_length=8,
        times=(1, 2),
        num_train=16,
        num_eval=4,
        steps=3,
        batch_size=4,
        rank=2,
    ),
)
FIRST, SECOND = PLAN.panels()
FIGURES = ("accuracy_by_length", "training_curves", "exposure_bias", "recall_by_length", "recall_losses")
FILES = {"report.json", "report.html", "note.txt", *(f"{name}.png" for name in FIGURES)}


def quiet():
    return Display(Console(file=io.StringIO()))


def figures(report):
    """Everything but times."""
    found = json.loads(json.dumps(report))
    found.pop("seconds")
    found.pop("tries")  # they name the folder
    for model in [*found["models"], *found["recall"]["models"]]:
        model.pop("seconds")
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(PLAN, out, quiet(), "memdlm demo")


def test_everything_is_left_in_the_folder(finished):
    out, report = finished
    assert {path.name for path in out.iterdir()} == FILES | {"checkpoints", MARKER}
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    rows = {(row["model"], row["seed"]) for row in report["models"]}
    assert rows == {(arm, seed) for arm in SECOND.arms for seed in PLAN.seeds}
    cells = {(row["model"], row["seed"], row["memory"], row["length"]) for row in report["accuracy"]}
    assert len(cells) == len(report["accuracy"]) == 2 * len(rows) * len(PLAN.open_book.lengths)
    assert len(report["exposure_bias"]) == 2 * len(rows)
    assert report["seconds"]["total"] > 0
    panel = report["recall"]
    rows = [(row["model"], row["seed"]) for row in panel["models"]]
    assert rows == [(arm, seed) for seed in PLAN.seeds for arm in FIRST.arms], "every seed is shown"
    cells = {(row["model"], row["seed"], row["memory"], row["length"]) for row in panel["accuracy"]}
    assert len(cells) == len(panel["accuracy"]) == 2 * len(rows) * len(PLAN.recall.times)
    assert [row["model"] for row in panel["models"] if "written" in row] == [OURS, OURS]


def test_a_model_has_one_name_and_the_page_says_once_how_it_was_trained(finished):
    assert set(SECOND.arms) < set(FIRST.arms)
    page = (finished[0] / "report.html").read_text()
    terms = re.findall(r"<dt>(.*?)</dt><dd>(.+?)</dd>", page)
    assert [name for name, _ in terms] == list(FIRST.arms)


def test_the_page_opens_with_its_finding_and_a_picture(finished):
    out, report = finished
    page = (out / "report.html").read_text()
    rows = [row for row in report["recall"]["accuracy"] if row["length"] == PLAN.recall.train_length]
    best = max(statistics.fmean(r["accuracy"] for r in rows if r["memory"] and r["model"] == m) for m in FIRST.arms)
    words = re.search(r'<p class="finding">(.*?)</p>\s*<figure', page, re.S)[1]
    assert f"answers {100 * best:.1f}".removesuffix(".0") in words
    assert "Guessing gives 25 %" in words
    header = page[: page.index("<main>")]
    assert header.index("finding") < header.index("<figure") < header.index('class="facts"')
    for title in ("Training", "Exposure bias", "Cost", "Configuration"):
        assert re.search(rf'<details class="section">\s*<summary><h2>{title}', page), "experts unfold it"


def test_the_commands_at_the_end_work_as_printed(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished[0])
    monkeypatch.chdir(tmp_path)
    lines = commands_to_try(FIRST, recall_study.recall_data(PLAN.recall), finished[0], Path("runs/demo"))
    report = json.loads((finished[0] / "report.json").read_text())
    place, memory = str(finished[0]), str(finished[0].with_name("note.mem"))
    assert [line.replace("runs/demo", place).replace("runs/note.mem", memory) for line in lines] == report["tries"]
    for line in [*lines, lines[0]]:  # the first a second time, as one does
        assert main(shlex.split(line)[1:]) == 0, line
    out = capsys.readouterr().out
    assert "tokens written in" in out
    assert str(Path("runs/note.mem")) in out
    assert re.match(r"memdlm ask .* 'Bring [A-Z][a-z]+'$", lines[1])
    assert "tokenizer does not have" not in out
    assert (finished[0] / "note.txt").read_text().split() == PLAN.recall.task.records(
        PLAN.recall.num_eval, PLAN.recall.train_length, seed=PLAN.recall.draws["held out"]
    )[0].context.split()


def test_the_command_that_activates_is_printed_where_it_is_needed(tmp_path, monkeypatch):
    (tmp_path / "a venv" / "bin").mkdir(parents=True)
    (tmp_path / "a venv" / "bin" / "activate").write_text("")
    monkeypatch.setattr("sys.prefix", str(tmp_path / "a venv"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert list(_activation()) == ["source 'a venv/bin/activate'"]
    (tmp_path / "memdlm").write_text("")
    (tmp_path / "memdlm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(_activation()) == []


def test_the_panels_checkpoint_loads_with_the_memory_it_learned(finished):
    out, report = finished
    folder = out / "checkpoints" / FIRST.checkpoint(OURS, 0)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    plan, length = PLAN.recall, PLAN.recall.train_length
    samples = plan.task.records(plan.num_eval, length, seed="recall held out")
    memory = ParametricMemory(model, mask_token_id=tokenizer.mask_token_id)
    assert memory.learned is not None
    found = recall(model, tokenizer, samples, steps=plan.task.num_questions, seed=0, memory=memory).accuracy
    keys = {"model": OURS, "seed": 0, "memory": True, "length": length}
    assert found == next(row for row in report["recall"]["accuracy"] if keys.items() <= row.items())["accuracy"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(finished, tmp_path):
    torch.rand(3)
    again = run_demo(PLAN, tmp_path, quiet(), "memdlm demo")
    assert figures(again) == figures(finished[1])
    with pytest.raises(ConfigError, match=r"holds a demo already.*add --overwrite"):
        run_demo(PLAN, tmp_path, quiet(), "memdlm demo")
    other = run_demo(dataclasses.replace(PLAN, seeds=(5,)), tmp_path, quiet(), "memdlm demo", overwrite=True)
    mine = [row["curve"]["loss"] for row in other["models"]]
    assert mine != [row["curve"]["loss"] for row in finished[1]["models"]][: len(mine)]


@pytest.mark.parametrize("arm", SECOND.arms)
def test_checkpoints_load_and_give_the_reported_accuracy(finished, arm):
    out, report = finished
    folder = out / "checkpoints" / SECOND.checkpoint(arm, 0)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    plan = PLAN.open_book
    length = plan.lengths[-1]
    samples = plan.task.records(plan.num_eval, length, seed="demo test")
    found = recall(model, tokenizer, samples, steps=2, seed=0).accuracy
    keys = {"model": arm, "seed": 0, "memory": False, "length": length}
    row = next(row for row in report["accuracy"] if keys.items() <= row.items())
    assert found == row["accuracy"]


def test_the_readmes_example_runs_on_the_demos_checkpoint(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished[0])
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def interrupt(monkeypatch, number):
    """Interrupt the training of one model, counted from 1."""
    real, calls = recall_study.train_arm, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(recall_study, "train_arm", interrupted)
    return calls


def interrupt_second_model(monkeypatch):
    """Of the second panel."""
    return interrupt(monkeypatch, len(FIRST.arms) * len(FIRST.seeds) + 2)


def test_an_interrupt_leaves_what_is_finished(tmp_path, monkeypatch):
    interrupt_second_model(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_demo(PLAN, tmp_path, quiet(), "memdlm demo")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["model"] for row in report["models"]] == ["MDLM"]
    assert "Interrupted" in report["notes"][-1]
    assert load_model(tmp_path / "checkpoints" / "mdlm-seed0") is not None


def test_an_interrupt_in_the_first_panel_leaves_what_is_finished(tmp_path, monkeypatch):
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run_demo(PLAN, tmp_path, quiet(), "memdlm demo")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["model"] for row in report["recall"]["models"]] == ["MDLM", PUBLISHED]
    assert report["models"] == []


@pytest.mark.slow
def test_an_interrupt_does_not_replace_an_earlier_report(tmp_path, monkeypatch):
    with output_folder(tmp_path, DEMO, overwrite=False) as output, output.replaced() as folder:
        (folder / "report.json").write_text("earlier")
    calls = interrupt_second_model(monkeypatch)
    for _ in range(2):  # the second time, an interrupted one is there as well
        with pytest.raises(KeyboardInterrupt):
            run_demo(PLAN, tmp_path, quiet(), "memdlm demo", overwrite=True)
        assert (tmp_path / "report.json").read_text() == "earlier"
        assert json.loads((tmp_path / "interrupted" / "report.json").read_text())["models"]
        (tmp_path / "interrupted" / "report.json").write_text("{}")
        calls.clear()


def test_threads_are_given_back(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(demo, "_make_data", fail)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        run_demo(PLAN, tmp_path, quiet(), "memdlm demo")
    assert torch.get_num_threads() == before


def test_a_bad_seed_and_a_folder_under_a_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--seed must be at least 0, got -2"):
        plan_for(-2, quick=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is, or lies under, a file"):
        run_demo(PLAN, tmp_path / "file" / "x", quiet(), "memdlm demo")


@pytest.mark.slow
def test_the_quick_demo_is_reproducible_and_learns_something(tmp_path):
    plan = plan_for(0, quick=True)
    first, second = (run_demo(plan, tmp_path / name, quiet(), "memdlm demo --quick --seed 0") for name in "ab")
    assert figures(first) == figures(second)
    for row in first["accuracy"]:
        if row["length"] == plan.open_book.train_length:
            assert row["accuracy"] > 3 * plan.open_book.task.chance
    found = {row["memory"]: row["accuracy"] for row in first["recall"]["accuracy"] if row["model"] == OURS}
    assert found[True] > found[False]
