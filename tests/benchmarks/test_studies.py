"""The studies: choices are made by code from rows, and every script runs from beginning to end in a tiny size."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "study"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def load():
    return importlib.import_module


@pytest.fixture
def rows(load, tmp_path):
    return load("study_rows").Rows(tmp_path / "rows.json")


def searched(controls, rows, found):
    """Rows of a search: per learning rate and seed, accuracy at 1x and 4x."""
    for rate, seeds in found.items():
        setting = {"learning_rate": rate, "inner_lr": None, "rank": None, "steps": 8}
        for seed, scores in seeds.items():
            accuracy = [{"memory": is_on, "accuracy": score} for score in scores for is_on in (True, False)]
            key = {"stage": "search", "plan": "window", "arm": "MDLM", "seed": seed, "setting": setting}
            rows.add(key | {"accuracy": accuracy, "cpu_seconds": 1.0})


def test_rows_are_kept_and_found_again(load, rows):
    rows.add({"arm": "a", "seed": 0})
    again = load("study_rows").Rows(rows.path)
    assert again.where(arm="a") == [{"arm": "a", "seed": 0}]
    again.drop(arm="a", seed=0)
    assert json.loads(rows.path.read_text())["rows"] == []


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ({1.0: {10: (0.5, 0.9), 11: (0.5, 0.9)}, 2.0: {10: (0.6, 0.1), 11: (0.5, 0.1)}}, 2.0),
        # Equal at 1x: 4x decides.
        ({1.0: {10: (0.5, 0.1), 11: (0.5, 0.1)}, 2.0: {10: (0.6, 0.2), 11: (0.4, 0.2)}}, 2.0),
        # A better one on a single seed was no finalist.
        ({1.0: {10: (0.5, 0.1), 11: (0.5, 0.1)}, 2.0: {10: (0.9, 0.9)}}, 1.0),
        # All equal: the first.
        ({2.0: {10: (0.5, 0.1)}, 1.0: {10: (0.5, 0.1)}}, 2.0),
    ],
)
def test_controls_are_chosen_by_their_means(load, rows, found, best):
    controls = load("controls")
    searched(controls, rows, found)
    assert controls.chosen(rows, "window", "MDLM").learning_rate == best


def test_a_control_without_a_search_is_refused(load, rows):
    with pytest.raises(SystemExit, match="run with --search first"):
        load("controls").chosen(rows, "window", "MDLM")


def test_a_search_stays_small_and_starts_from_the_main_comparison(load, rows):
    controls = load("controls")
    study = controls.Study(rows, "window", "search", 2, False, "now")
    asked = []

    def measured(name, setting, seed):
        asked.append((setting, seed))
        score = 1.0 if setting.learning_rate == 1e-2 and setting.steps == 400 else 0.1
        return {"accuracy": [{"memory": True, "accuracy": score}]}

    study.measured = measured
    controls.search(study, controls.OURS, [10, 11])
    start = controls.start_of(study.base(), controls.OURS)
    assert (start.learning_rate, start.inner_lr, start.rank, start.steps) == (5e-3, 10.0, 16, 200)
    assert len({each for each, seed in asked if seed == 10}) == 9
    assert sum(seed == 11 for _, seed in asked) == controls.FINALISTS


def test_compute_is_made_equal_to_seconds_of_one_run(load, rows):
    controls = load("controls")
    study = controls.Study(rows, "window", "test", 2, True, "now")
    settings = {arm: controls.start_of(study.base(), arm) for arm in (controls.OURS, controls.PLAIN)}

    def add(arm, run):
        setting = controls.dataclasses.asdict(settings[arm])
        rows.add({"stage": "test", "plan": "window", "seed": 0, "arm": arm, "run": run, "setting": setting})

    for runs, kept in ((("a", "a"), 2), (("a", "b"), 0), (("a",), 0)):
        rows.drop(stage="test")
        for arm, run in zip(settings, runs, strict=False):
            add(arm, run)
        controls.of_one_run(study, settings, 0)
        assert len(rows.where(stage="test")) == kept


def test_the_wide_network_has_at_least_as_many_parameters_and_not_many_more(load, rows):
    controls = load("controls")
    study = controls.Study(rows, "window", "test", 2, True, "now")
    setting = controls.start_of(study.base(), "MDLM")
    plan = study.plan_of(setting, {})
    count = controls.new_model(plan, study.data(plan), 0).num_parameters()
    sizes = controls.wide(study, setting, count + 1)
    wider = controls.new_model(study.plan_of(setting, sizes), study.data(plan), 0).num_parameters()
    assert count < wider < 1.2 * count


def test_a_way_pays_from_the_question_that_makes_up_for_the_write(load):
    pays_from = load("instead").pays_from
    way = {"write_seconds": 0.5, "read_seconds": 0.5, "question_seconds": 0.75}
    assert pays_from(way, {"question_seconds": 1.25}) == 3
    assert pays_from(way, {"question_seconds": 0.75}) == float("inf")
    assert pays_from(way | {"write_seconds": 0.0, "read_seconds": 0.0}, {"question_seconds": 1.0}) == 1


def test_all_ways_answer_as_the_package_does(load):
    """The study's decoding gives the answers of `recall`, for the text in sight and for a memory, also from a file."""
    ways, instead = load("ways"), load("instead")
    from memdlm.evaluation import recall
    from memdlm.workflows.studies.recall_study import recall_data

    bench = instead.Bench(None, "test", 2, 1, True)
    data = recall_data(bench.plan)
    text, ours = bench.text_model(5e-3, 0), bench.ours(0)
    rates = {"same targets": {1: 1e-3, 2: 1e-3}}
    for sample, document in zip(bench.asked(4), ways.documents(data.tokenizer, bench.asked(4)), strict=True):
        found = {each.way: each for each in instead.ways(bench, document, text.model, ours, rates, 0)}
        for way, model, context in (
            ("text in the context", text.model, "kept"),
            ("LoRA, 0 steps", text.model, "dropped"),
        ):
            if way in found:
                correct = recall(model, data.tokenizer, sample.alone(), steps=2, batch_size=1, context=context).correct
                assert sum(each.is_exact for each in found[way].answers) == correct
        memories = [[each.is_exact for each in found[way].answers] for way in ("memory", "memory, from its file")]
        assert memories[0] == memories[1]
        # Keys and values of one layer pair: 2 x 2 layers x L x width, in float32, the user's mark included.
        assert found["keys and values kept (approximate)"].num_bytes == 4 * 4 * (len(document.ids) + 1) * 48


def test_a_variant_changes_what_it_says_and_the_default_nothing(load):
    variants, suite = load("variants"), load("recall_suite").suite()
    plan = suite["several values per key"]
    usual = variants.VARIANTS[variants.PRESET].applied(plan)
    assert usual == (plan, variants.arms(plan)[variants.OURS])
    seen = [variant.applied(plan) for variant in variants.VARIANTS.values()]
    assert all(each != usual for each in seen[1:])
    doubled, config = variants.VARIANTS["rank doubled"].applied(plan)
    assert (doubled.rank, config.inner_rank, config.inner_alpha) == (64, 64, 128.0)


@pytest.mark.parametrize("name", ["words", "letters"])
@pytest.mark.parametrize("pairs", [8, 96])
def test_a_text_of_pairs_is_nothing_but_pairs(load, name, pairs):
    task = load("capacity").TASKS[name]
    (sample,) = task.records(1, pairs * task.words_of_pair, seed=0)
    words = sample.context.split()
    each = [words[at : at + task.words_of_pair] for at in range(0, len(words), task.words_of_pair)]
    keys = [" ".join(pair[: -task.words_of_answer]) for pair in each]
    values = [" ".join(pair[-task.words_of_answer :]) for pair in each]
    assert len(set(keys)) == pairs
    told = dict(zip(keys, values, strict=True))
    asked = [turn["content"] for turn in sample.without_context()]
    assert [told[question] for question in asked[::2]] == asked[1::2]
    assert {*words} <= {*task.words()}


@pytest.mark.parametrize(("between", "key_words", "value_words"), [(0, 1, 1), (3, 1, 1), (1, 2, 2)])
def test_a_value_stands_as_far_from_its_key_as_was_asked(load, between, key_words, value_words):
    distance = load("distance")
    task = distance.Distant(between=between, key_words=key_words, value_words=value_words)
    (sample,) = task.records(1, distance.plan_of(task, 1).train_length, seed=0)
    asked = [turn["content"] for turn in sample.without_context()]
    for question, answer in zip(asked[::2], asked[1::2], strict=True):
        assert f"{question} {answer}" in sample.context
        assert len(question.split()) == 1 + key_words + between
        assert len(answer.split()) == value_words


@pytest.mark.parametrize("is_fixed", [True, False])
def test_only_fixed_pairs_are_the_same_in_every_text(load, is_fixed):
    distance = load("distance")
    task = distance.Distant(between=2, is_fixed=is_fixed)
    values = {}
    for sample in task.records(40, distance.plan_of(task, 1).train_length, seed=0):
        asked = [turn["content"] for turn in sample.without_context()]
        for question, answer in zip(asked[::2], asked[1::2], strict=True):
            values.setdefault(question, set()).add(answer)
    assert len(values) == distance.NAMES
    assert (max(map(len, values.values())) == 1) == is_fixed
    if is_fixed:
        assert len(set().union(*values.values())) == distance.NAMES


@pytest.mark.slow
def test_networks_that_read_first_have_rows_of_their_own(tmp_path):
    out = tmp_path / "rows.json"
    words = [sys.executable, str(FOLDER / "distance.py"), "--between", "2", "--steps", "4", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1] / "src")}
    for more in ([], ["--reader_steps", "4"], [], ["--reader_steps", "4"]):
        subprocess.run([*words, *more], env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(out.read_text())["rows"]
    assert [row["reader_steps"] for row in rows] == [None, 4]
    assert rows[0]["curve"] != rows[1]["curve"]


@pytest.fixture
def vectors(load):
    """A decoder with vectors, and two texts."""
    torch.manual_seed(0)
    return load("prefix_memory").Decoder(24, writes=2, inner_lr=0.5).double(), torch.randint(24, (2, 12))


def test_every_text_has_a_write_of_its_own(vectors):
    model, texts = vectors
    together, _ = model.eval().write(texts)
    alone = torch.cat([model.write(text[None])[0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_a_write_steps_down_the_loss_of_its_text(vectors):
    model, texts = vectors
    model.eval()
    model.writes = 1
    first, loss = model.write(texts[:1])
    # A small way down the slope, the loss is lower by as much as the slope says.
    (slope,) = ((model.start - first[0]) / model.inner_lr).detach()[None]
    model.start.data -= 1e-3 * slope
    _, after = model.write(texts[:1])
    expected = 1e-3 * float(slope.square().sum())
    assert float((loss - after).detach()) == pytest.approx(expected, rel=0.05)


def test_the_answer_is_differentiated_through_the_write(vectors):
    model, texts = vectors
    model.train()
    logits, _ = model.answers(texts, texts[:, :4])
    logits.square().sum().backward()
    # The head reads the write's loss only: it has a gradient through the write, or none.
    assert float(model.write_head.weight.grad.abs().max()) > 0


@pytest.mark.slow
def test_the_prefix_memory_runs_from_beginning_to_end():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1] / "src")}
    words = [sys.executable, str(FOLDER / "prefix_memory.py"), "--smoke"]
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert "8 vectors" in said
    assert "text in context" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["controls.py"],
        ["instead.py"],
        ["lengths.py", "--seeds", "0"],
        ["memories.py", "--seeds", "0"],
        ["suite.py", "--variants", "all", "--tasks", "several values per key", "chain, one hop"],
    ],
    ids=lambda command: command[0],
)
def test_a_study_runs_from_beginning_to_end_and_not_twice(command, tmp_path):
    out = tmp_path / "rows.json"
    script, *options = command
    words = [sys.executable, str(FOLDER / script), *options, "--smoke", "--out", str(out)]
    source = str(FOLDER.parents[1] / "src")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    first = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(out.read_text())["rows"]
    again = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert rows
    assert json.loads(out.read_text())["rows"] == rows
    table = [line for line in first.stdout.splitlines() if line.startswith("|")]
    assert table
    assert table == [line for line in again.stdout.splitlines() if line.startswith("|")]
