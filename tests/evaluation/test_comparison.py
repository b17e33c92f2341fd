"""`memdlm report`: every kind of run is read, a memory row never stands alone, and no figure is counted twice."""

import json
import re

import pytest

from memdlm.cli.main import main
from memdlm.errors import DataError
from memdlm.report.build import write_report
from memdlm.report.comparison import wilson
from memdlm.report.pages import css_string
from memdlm.report.runs import labels, model_and_seed, read_runs

LENGTHS = ("1024", "4096")


def evaluation(folder, model="runs/mdlm-seed0", memory=False, score=0.8, task="memdlm_kv", **extra):
    values = {f"{length},none": score for length in LENGTHS} | {f"{length}_stderr,none": 0.01 for length in LENGTHS}
    results = {"alias": task, "exact_match,none": score, "exact_match_stderr,none": 0.02, "chance,none": 0.25, **values}
    cost = {"requests": 200, "seconds": 10.0, "tokens_per_second": 12.5, "forward_passes": 777, "written_tokens": 9}
    cost |= {"write_ms_per_token": 0.125 if memory else None, "peak_memory_bytes": 3_000_000_000}
    ours = {"options": {"pretrained": model, "mem_enabled": memory, "request_seed": 0}, "cost": cost, "processes": 1}
    data = {
        "results": {task: results, **extra},
        "n-samples": {task: {"effective": 200}},
        "config": {"model": "memdlm", "model_args": {"pretrained": model}, "memdlm": ours},
    }
    place = folder / "some__model"
    place.mkdir(parents=True, exist_ok=True)
    number = len(list(place.iterdir()))
    (place / f"results_2026-01-0{number + 1}.json").write_text(json.dumps(data))
    return folder


def training(folder, memory=False):
    log = [{"loss": 2.0, "step": 5}, {"eval_nll": 1.5, "step": 5, **({"eval_nll_memory": 1.0} if memory else {})}]
    (folder / "checkpoint-10").mkdir(parents=True)
    state = {"log_history": [*log, {"train_runtime": 3.5, "step": 10}], "global_step": 10}
    (folder / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    return folder


def told(folder, **options):
    (folder / "run.json").write_text(json.dumps({"options": {"output_dir": str(folder), "lora": True, **options}}))
    return folder


def demo(folder, model="MDLM"):
    row = {"model": model, "seed": 0, "memory": False, "length": 40, "accuracy": 0.9, "questions": 100}
    report = {
        "title": "t", "version": "0", "date": "d", "command": "memdlm demo", "seeds": [0], "quick": True, "notes": [],
        "machine": {"cores": 1, "torch": "t", "python": "p"}, "seconds": {"total": 1.0},
        "task": {"name": "recall", "description": "d", "chance": 0.1, "train_length": 40, "lengths": [40],
                 "num_questions": 1},
        "models": [], "accuracy": [row, {**row, "memory": True, "accuracy": 0.95}], "exposure_bias": [],
    }  # fmt: skip
    write_report(report, folder)
    return folder


def words(path):
    page = re.sub(r"<style>.*?</style>|data:[^\"]*", "", path.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_runs_of_every_kind_stand_on_one_page(tmp_path, capsys):
    first = evaluation(tmp_path / "eval", score=0.8)
    evaluation(first, memory=True, score=0.9)
    evaluation(first, model="runs/mdlm-seed1", score=0.6)
    runs = [first, training(tmp_path / "sft-seed0"), demo(tmp_path / "demo")]
    page = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = words(page)
    # Two seeds, 0.8 and 0.6 of 100 questions each: the interval is that of 140 out of 200.
    assert "mdlm off 70.0 63.3 to 75.9 2 seeds &plusmn; 10.0" in text
    assert "mdlm on 90.0 82.6 to 94.5" in text
    assert "mdlm on memdlm_kv exact_match 0.9000 0.8608 to 0.9392 200" in text
    assert "mdlm on memdlm_kv 200 10.0 12.5 777 9 0.125 3.00" in text
    assert "Chance is 25.0 %." in text
    assert "recall" in text
    assert "Evaluation loss over training steps" in page.read_text()
    assert "Not shown" not in text


def test_a_memory_row_without_its_baseline_is_refused(tmp_path):
    run = evaluation(tmp_path / "eval", memory=True, score=0.9)
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    text = words(page)
    assert (
        "Not shown: memdlm_kv of mdlm with memory, because there is no result without memory to compare with." in text
    )
    assert "90.0" not in text
    assert "0.9000" not in text
    evaluation(run, model="runs/mdlm-seed1", memory=False)
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert "90.0" not in words(page), "another seed is no baseline"


def test_the_standard_model_is_asked_for(tmp_path):
    page = tmp_path / "report.html"
    trained = training(tmp_path / "memdlm-seed0", memory=True)
    assert main(["report", str(trained), "--output", str(page)]) == 0
    assert "All training runs here use memory" in words(page)
    assert main(["report", str(trained), str(training(tmp_path / "mdlm-seed0")), "--output", str(page)]) == 0
    assert "All training runs here use memory" not in words(page)
    evaluated = evaluation(tmp_path / "eval")
    assert main(["report", str(evaluated), "--output", str(page)]) == 0
    assert "Add a model that was trained without memory" in words(page)


def test_the_interval_of_a_share_stays_a_share(tmp_path):
    for name, score, error in (("all", 1.0, 0.0), ("most", 0.99, (0.99 * 0.01 / 199) ** 0.5), ("other", 0.99, 0.02)):
        folder = evaluation(tmp_path / name, model=f"runs/{name}-seed0", score=score, task="gsm")
        file = next(folder.glob("*/results_*.json"))
        data = json.loads(file.read_text())
        data["results"]["gsm"]["exact_match_stderr,none"] = error
        file.write_text(json.dumps(data))
    page = tmp_path / "report.html"
    assert main(["report", *(str(tmp_path / name) for name in ("all", "most", "other")), "--output", str(page)]) == 0
    text = words(page)
    assert "all off gsm exact_match 1.0000 0.9812 to 1.0000 200" in text
    assert "most off gsm exact_match 0.9900 0.9643 to 0.9973 200" in text
    assert "other off gsm exact_match 0.9900 0.9508 to 1.0292 200" in text


def test_how_the_training_runs_differ_is_said(tmp_path):
    plain = told(training(tmp_path / "mdlm-seed0"), mem_enabled=False, planner_weight=0.0, seed=0)
    papl = told(training(tmp_path / "papl-seed0"), mem_enabled=False, planner_weight=1.0, seed=1)
    memory = told(training(tmp_path / "memdlm-seed0"), mem_enabled=True, planner_weight=0.0, mem_inner_lr=0.1)
    page = tmp_path / "report.html"
    assert main(["report", *map(str, (plain, papl, memory)), "--output", str(page)]) == 0
    text = words(page).split("Sources of the numbers")[0]
    assert "option mdlm papl memdlm" in text
    assert "mem_enabled false false true" in text
    assert "planner_weight 0.0 1.0 0.0" in text
    for name in ("output_dir", "lora", "mem_inner_lr", "seed 0"):
        assert name not in text
    assert main(["report", str(memory), "--output", str(page)]) == 0
    assert "All training runs here use memory" in words(page)


def test_lengths_that_were_not_measured_are_left_out(tmp_path):
    run = evaluation(tmp_path / "eval", task="ruler_vt")
    path = next(run.glob("**/results_*"))
    data = json.loads(path.read_text())
    data["results"]["ruler_vt"]["4096,none"] = -1
    path.write_text(json.dumps(data))
    assert {row.length for row in read_runs([run]).accuracy} == {1024}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: evaluation(evaluation(path), model="./b/mdlm-seed0"),
            "two of the runs have a result for task 'memdlm_kv'",
        ),
        (lambda path: path, "is no folder"),
        (lambda path: path.mkdir() or path, "holds no results; looked for report.json, results_"),
    ],
)
def test_runs_that_cannot_be_read_are_named(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        read_runs([make(tmp_path / "run")])


def test_two_demos_keep_their_models_apart(tmp_path):
    rows = read_runs([demo(tmp_path / "a"), demo(tmp_path / "b")]).accuracy
    assert {row.model for row in rows} == {"a: MDLM", "b: MDLM"}


def test_names_of_runs_and_models(tmp_path):
    assert labels([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    with pytest.raises(DataError, match="the same folder"):
        labels([tmp_path, tmp_path])
    assert model_and_seed("runs/demo/checkpoints/memdlm-seed3") == ("memdlm", 3)
    assert model_and_seed("inclusionAI/LLaDA-MoE") == ("inclusionAI/LLaDA-MoE", None)


def test_the_interval_holds_the_share_and_stays_inside():
    for count in (1, 10, 1000):
        for share in (0.0, 0.3, 1.0):
            low, high = wilson(share, count)
            assert 0 <= low <= share <= high <= 1
            assert low < high
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_of_an_evaluation_that_was_run_again_the_newest_counts(tmp_path, caplog):
    folder = tmp_path / "run"
    for score in (0.5, 0.75):
        evaluation(folder, score=score)
    evaluation(folder, memory=True, score=0.9)
    measured = read_runs([folder])
    assert {(row.memory, row.accuracy) for row in measured.accuracy} == {(False, 0.75), (True, 0.9)}
    assert len(measured.accuracy) == 4
    assert "memdlm_kv was evaluated again with the same options" in caplog.text


@pytest.mark.parametrize(
    "state",
    [
        {"log_history": [{"loss": 1.0}]},
        {"log_history": 3},
        {"log_history": [{"eval_nll": 1.0}]},
    ],
    ids=str,
)
def test_a_damaged_run_is_named(tmp_path, state, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 2
    assert "its results are damaged" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_curves_of_runs_that_were_not_evaluated_are_drawn_and_empty_parts_left_out(tmp_path):
    """Several runs side by side: each has its line, its last losses, and no line for what it did not log."""
    for name, memory in (("mdlm-seed0", False), ("mdlm-seed1", False), ("memdlm-seed0", True), ("old-seed0", None)):
        entries = [
            {"step": step, "loss": 1.0, **({} if memory is None else {"nll": 2.0 + step})}
            | ({"nll_memory": 0.5} if memory else {})
            for step in (5, 10)
        ]
        (tmp_path / name).mkdir()
        state = {"log_history": [*entries, {"train_runtime": 3.5, "step": 10}], "global_step": 10}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
        told(tmp_path / name, mem_enabled=bool(memory))
    found = {(row.model, row.seed): row.logged for row in read_runs(sorted(tmp_path.iterdir())).models}
    assert found["memdlm", 0].without == ((5, 7.0), (10, 12.0))
    assert found["memdlm", 0].memory == ((5, 0.5), (10, 0.5))
    assert found["old", 0].without == ((5, 1.0), (10, 1.0))
    assert (found["mdlm", 1].memory, found["mdlm", 1].steps, found["mdlm", 1].seconds) == ((), 10, 3.5)
    runs, page = [str(run) for run in sorted(tmp_path.iterdir())], tmp_path / "report.html"
    assert main(["report", *runs, "--output", str(page)]) == 0
    assert page.read_text().count('alt="Training loss over training steps"') == 1
    text = words(page)
    assert "last training loss the same with memory steps seconds" in text
    assert "memdlm 12.00 0.50 10 3.5" in text
    for absent in ("Accuracy", "Scores", "Exposure bias", "Cost", "last evaluation loss", "measured"):
        assert absent not in text


def test_a_loss_that_is_all_a_log_has_counts_as_what_training_used(tmp_path):
    for name, memory in (("mdlm", False), ("memdlm", True)):
        told(training(tmp_path / name, memory=memory), mem_enabled=memory)
    rows = {row.model: row.logged for row in read_runs([tmp_path / "mdlm", tmp_path / "memdlm"]).models}
    assert rows["mdlm"].without == rows["memdlm"].memory == ((5, 2.0),)
    assert rows["mdlm"].memory == rows["memdlm"].without == ()


def test_a_run_without_logs_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    assert "None of these runs logged a loss. Train with --logging_steps." in words(tmp_path / "report.html")


def test_heads_of_cards_cannot_leave_their_string():
    assert css_string('a"b\\</style>;') == '"a\\22 b\\5c \\3c \\2f style\\3e \\3b "'
