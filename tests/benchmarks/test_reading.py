"""The studies of English: what they ask can be told from the text alone, and every script runs, tiny."""

import dataclasses
import gzip
import os
import re
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memdlm.errors import ConfigError
from memdlm.types import IGNORE_INDEX

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "study"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def words_in(page):
    return set(re.findall("[A-Za-z]+", page.text))


@pytest.mark.parametrize("cloze", [0.0, 1.0])
def test_every_answer_stands_in_the_text_and_no_question_gives_it_away(cloze):
    from small_english import page

    for index in range(100):
        found = page("test", index, facts=6, filler=3, cloze=cloze)
        assert len(found.questions) == 6
        for question in found.questions:
            assert question.answer in found.text
            assert f" {question.answer}" not in question.text
        assert found == page("test", index, facts=6, filler=3, cloze=cloze)


def test_names_and_objects_of_the_test_are_in_no_training_document():
    from small_english import PARTS, words_of

    for name in ("first_names", "surnames", "nouns", "events"):
        parts = [set(getattr(words_of(part), name)) for part in PARTS]
        assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(words_of("train").first_names) > 2000


def test_all_kinds_of_questions_are_asked_in_other_words():
    from small_english import KINDS, page

    asked = [question for index in range(60) for question in page("train", index, facts=4, filler=0).questions]
    assert {question.kind for question in asked} == set(KINDS)
    for kind in KINDS:
        beginnings = {question.text.split()[0] for question in asked if question.kind == kind}
        assert len(beginnings) > 1


def test_documents_can_have_facts_of_one_kind_only():
    from small_english import KINDS, page

    asked = [page("train", index, facts=4, alike=1.0).questions for index in range(40)]
    kinds = [{question.kind for question in each} for each in asked]
    assert all(len(each) == 1 for each in kinds)
    assert set.union(*kinds) == set(KINDS)


def test_an_exercise_has_said_before_what_it_asks_for():
    from pages import GappedText, Page
    from small_english import exercise, words_of

    names = {*words_of("train").first_names, *words_of("train").events}
    found = [exercise(index, facts=2) for index in range(60)]
    assert found == [exercise(index, facts=2) for index in range(60)]
    assert {type(each) for each in found} == {Page, GappedText}
    for each in found:
        if isinstance(each, Page):
            said = [(question.text, question.answer) for question in each.questions]
        else:
            said = [(each.text[:first], each.text[first:last]) for first, last in each.gaps]
        assert len(said) == 2
        assert all(answer in names and answer in text for text, answer in said)


def test_an_exercise_hides_answers_alone_and_has_the_tokens_of_its_text():
    from pages import GappedText, Reader
    from whose import Whose

    corpus = Whose(is_tiny=True)
    reader = Reader(corpus)
    for index in range(30):
        found, row = corpus.exercise(index), reader.exercise(index)
        hidden = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
        assert [label for label in row.labels if label != -100] == hidden
        if isinstance(found, GappedText):
            assert row.input_ids == reader.encoder.text(found.text)
            answers = "".join(f" {found.text[first:last]}" for first, last in found.gaps)
        else:
            answers = "".join(f" {question.answer}" for question in found.questions)
        said = corpus.tokenizer.decode([token for token in hidden if token != reader.end])
        assert said.split() == answers.split()


def test_a_corpus_without_exercises_says_so():
    from english import English

    with pytest.raises(ConfigError, match="reader_steps: english has no reading exercises"):
        English(is_tiny=True).exercise(0)


def test_all_facts_of_whose_it_is_are_of_one_kind():
    from whose import Whose

    corpus = Whose(is_tiny=True)
    pages = [corpus.page("test", index, corpus.stages[0]) for index in range(20)]
    assert {question.kind.split()[0] for each in pages for question in each.questions} == {"job"}
    assert all(len(each.questions) == 4 for each in pages)


def test_documents_of_all_kinds_are_trained_with_one_kind_each_and_asked_both_ways():
    from pages import Page, Reader
    from small_english import KINDS
    from whose_all import WhoseAll

    corpus = WhoseAll(is_tiny=True)
    trained = [corpus.page("train", index, corpus.stages[0]).questions for index in range(30)]
    kinds = [{question.kind.split()[0] for question in each} for each in trained]
    assert all(len(each) == 1 for each in kinds)
    assert set.union(*kinds) == set(KINDS)
    exercises = [found for found in map(corpus.exercise, range(60)) if isinstance(found, Page)]
    assert {question.kind.split()[0] for each in exercises for question in each.questions} == set(KINDS)
    reader = Reader(corpus)
    assert any(len(set(each.kinds)) > 1 for each in reader.pages("test", 10, in_sight=False))
    assert all(len(set(each.kinds)) == 1 for each in reader.pages("test", 10, in_sight=False, alike=1.0))


def test_documents_among_filler_are_those_of_the_study_of_english():
    from among import Among
    from pages import Stage
    from small_english import page

    corpus, stage = Among(is_tiny=True), Stage(share=1.0, facts=4, filler=2)
    assert dataclasses.replace(corpus.stages[-1], share=1.0, cloze=0.0, alike=0.0) == stage
    for index in range(20):
        assert corpus.page("test", index, stage) == page("test", index, facts=4, filler=2)


def test_exercises_hide_answers_as_a_whole_at_the_whole_learning_rate(monkeypatch):
    from exercises import Exercises
    from reading import Rows, Run
    from whose_all import WhoseAll

    monkeypatch.setattr(WhoseAll, "time_epsilon", 0.5)
    wanted = Run(corpus=WhoseAll(is_tiny=True), size="smoke", arm="memory", seed=0, reader_steps=4)
    reader = None
    found = {
        kind: wanted.trainer(wanted.new_network(), rows, 4).args
        for kind, rows in {
            "exercises": Exercises(reader, 0, 16),
            "memory": Rows(reader, wanted, 4, wanted.corpus.stages),
        }.items()
    }
    assert (found["exercises"].time_epsilon, found["exercises"].mem_enabled) == (0.999, False)
    assert (found["memory"].time_epsilon, found["memory"].mem_enabled) == (0.5, True)
    rate = found["exercises"].learning_rate
    assert found["memory"].learning_rate == pytest.approx(wanted.corpus.after_reading * rate)


def test_who_reads_on_adds_the_gradient_of_exercises_that_come_after_those_before():
    from exercises import Exercises
    from pages import Reader
    from reading import Rows, Run
    from transformers import TrainerCallback
    from whose_all import WhoseAll

    corpus = WhoseAll(is_tiny=True)
    reader = Reader(corpus)
    found = {}

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found[args.run_name] = {name: each.grad.clone() for name, each in model.named_parameters()}

    for reads_on in (False, True):
        wanted = Run(corpus=corpus, size="smoke", arm="memory", seed=3, reader_steps=2, reads_on=reads_on)
        trainer = wanted.trainer(wanted.new_network(), Rows(reader, wanted, 1, corpus.stages), 1)
        trainer.args.run_name, trainer.args.max_grad_norm = reads_on, 0.0
        trainer.add_callback(Seen)
        trainer.train()
    network = wanted.new_network()
    for number in range(4):
        # Two steps of four exercises were before. Each row alone: padding must not count.
        row = Exercises(reader, 3, 12)[8 + number]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = network(input_ids=ids.masked_fill(labels != -100, corpus.tokenizer.mask_token_id)).logits
        found.setdefault("lost", []).append(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none"))
        found.setdefault("asked", []).append(labels[0] != -100)
    lost, asked = torch.cat(found["lost"]), torch.cat(found["asked"])
    (lost[asked].sum() / asked.sum()).backward()
    for name, each in network.named_parameters():
        torch.testing.assert_close(found[True][name] - found[False][name], each.grad, rtol=1e-3, atol=1e-5)
    assert max(float(each.abs().max()) for each in found[False].values()) > 0


def test_answers_are_hidden_as_a_whole_up_to_a_step_and_then_by_any_share(monkeypatch):
    from pages import Reader
    from reading import Rows, Run
    from whose_all import WhoseAll

    from memdlm.training.objective import OuterObjective

    corpus, shares = WhoseAll(is_tiny=True), []
    wanted = Run(corpus=corpus, size="smoke", arm="memory", seed=0, batch=2, whole_until=0.5, targets="o_proj")
    trainer = wanted.trainer(wanted.new_network(), Rows(Reader(corpus), wanted, 4, corpus.stages), 4)
    noised = OuterObjective.noised

    def seen(objective, *args):
        batch = noised(objective, *args)
        shares.append((batch.noised.is_masked.sum() / batch.is_maskable.sum()).item())
        assert len(batch.clean) == 2
        return batch

    monkeypatch.setattr(OuterObjective, "noised", seen)
    trainer.train()
    assert min(shares[:2]) > 0.95
    assert all(share < 0.95 for share in shares[2:])
    assert all("o_proj" in name for name in trainer.memory.fast.names())


def test_a_corpus_that_never_hides_answers_as_a_whole_refuses_to_do_so_up_to_a_step():
    from english import English
    from pages import Reader
    from reading import Rows, Run

    corpus = English(is_tiny=True)
    wanted = Run(corpus=corpus, size="smoke", arm="memory", seed=0, whole_until=0.5)
    with pytest.raises(ConfigError, match=r"whole_until=0\.5: english never hides"):
        wanted.trainer(wanted.new_network(), Rows(Reader(corpus), wanted, 8, corpus.stages), 8)


def test_a_slot_does_not_tell_how_long_its_answer_is():
    from english import English
    from pages import Reader, answer_spans_of

    corpus = English(is_tiny=True)
    reader = Reader(corpus)
    for hidden, shown in zip(
        reader.pages("test", 5, in_sight=False), reader.pages("test", 5, in_sight=True), strict=True
    ):
        assert shown.shown.input_ids == hidden.context + hidden.shown.input_ids
        spans = answer_spans_of(hidden, corpus.slot)
        assert len(spans) == len(hidden.kinds)
        for first, last in spans:
            assert hidden.shown.input_ids[last - 1] == reader.end
            assert reader.said(hidden.shown.input_ids[first:last]).strip() in corpus.tokenizer.decode(hidden.context)


def test_answers_of_the_document_to_the_same_kind_of_question_can_be_chosen_and_no_others():
    from english import English
    from pages import Page, Question, Reader

    reader = Reader(English(is_tiny=True))
    told = Page("", [Question("job", "Who is Mira?", "baker", ["diver", "baker", "word " * 20])])
    asked = reader.ask(told, in_sight=False)
    assert [[reader.said(slot).strip() for slot in slots] for slots in asked.choices] == [["baker", "diver"]]
    for each in reader.pages("test", 8, in_sight=False, alike=1.0):
        # Of one kind each, so that every answer of the document can be chosen, and the right one comes first.
        answers = {tuple(slots[0]) for slots in each.choices}
        assert all({tuple(slot) for slot in slots} == answers for slots in each.choices)
    for each in reader.pages("test", 8, in_sight=False):
        for kind, slots in zip(each.kinds, each.choices, strict=True):
            assert len(slots) <= each.kinds.count(kind)


class Says(torch.nn.Module):
    """Holds the slots that it is given for likely, and everything else for very unlikely."""

    def __init__(self, asked, slots, vocabulary):
        from pages import answer_spans_of

        super().__init__()
        self.logits = torch.full((1, len(asked.shown.input_ids), vocabulary), -20.0)
        for (first, last), slot in zip(answer_spans_of(asked, len(slots[0])), slots, strict=True):
            self.logits[0, range(first, last), slot] = 0.0
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits)


def test_the_answer_is_chosen_that_is_the_likeliest_of_the_documents():
    from english import English
    from page_measures import measured
    from pages import Page, Question, Reader

    reader = Reader(English(is_tiny=True))
    jobs = {"Mira": "baker", "Tol": "diver", "Bren": "baker"}
    questions = [
        Question("job", f"Who is {who}?", job, sorted(set(jobs.values()) - {job})) for who, job in jobs.items()
    ]
    asked = reader.ask(Page("", [*questions, Question("time", "When?", "at noon")]), in_sight=False)

    def figures(*said):
        model = Says(asked, [reader.slot(each) for each in said], len(reader.corpus.tokenizer))
        return measured(reader, model, [asked], memory=None, shift=0, seed=0, decodes=False)

    right = figures("baker", "diver", "baker", "at noon")
    assert (right["chosen"], right["guessed"], right["questions_with_choice"]) == (1.0, 0.5, 3)
    # Nobody asked for a time of the other facts: it cannot be chosen, however likely it is.
    assert figures("diver", "diver", "baker", "baker")["chosen"] == pytest.approx(2 / 3)
    assert figures("diver", "baker", "diver", "at noon")["chosen"] == 0.0


def test_steps_are_shared_out_among_the_stages():
    from pages import Stage
    from reading import shared_out

    stages = [Stage(share=share, facts=1) for share in (0.3, 0.3, 0.4)]
    assert shared_out(10, stages) == [3, 3, 4]
    assert sum(shared_out(7, stages)) == 7


def test_a_budget_ends_a_training():
    from types import SimpleNamespace

    from reading import Budget

    times, looked = iter([0.0, 1.0, 2.0, 3.5]), []
    budget = Budget(lambda: next(times), 3.0, 2, looked.append)
    control, state = SimpleNamespace(should_training_stop=False), SimpleNamespace(global_step=0, max_steps=10)
    for step in (1, 2, 3):
        assert not control.should_training_stop
        state.global_step = step
        budget.on_step_end(None, state, control)
    assert control.should_training_stop
    assert looked == [2]
    assert budget.ends == [1.0, 2.0, 3.5]


# The dictionary -----------------------------------------------------------------------------------------------------

ENTRIES = (
    'Anvil \\An"vil\\ (a), n. [OE. anvelt; cf. L.\n   incus.]\n'
    "   1. An iron block on which metals are\n      hammered. [1913 W]\n",
    "Sail \\Sail\\, v.\n   (Naut.) To move upon water by the wind; also, to glide.\n",
    "Long \\Long\\, a.\n   " + " ".join(["far"] * 30) + ".\n",
    "Clean \\Clean\\, a.\n   Being clean and nothing else.\n",
    "Another thing\n   Without a head that is spoken.\n",
)
DIGITS = string.ascii_uppercase + string.ascii_lowercase + "0123456789+/"


def digits(number):
    return (digits(number // 64) if number >= 64 else "") + DIGITS[number % 64]


def test_short_definitions_are_found_in_files_of_dictd(tmp_path):
    import dictionary

    text, lines = "\n" * 100, []
    for entry in ENTRIES:
        lines.append(f"{entry.split()[0]}\t{digits(len(text))}\t{digits(len(entry))}\n")
        text += entry
    (tmp_path / "gcide.dict.dz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "gcide.index").write_text("".join(lines))
    assert list(dictionary.entries(tmp_path)) == [
        ("anvil", "an iron block on which metals are hammered"),
        ("sail", "to move upon water by the wind"),
    ]


def test_a_missing_dictionary_says_what_installs_it(tmp_path):
    import dictionary

    with pytest.raises(SystemExit, match="apt-get install dict-gcide"):
        dictionary.installed(tmp_path)


def test_headwords_of_the_test_are_in_no_training_entry(monkeypatch):
    import dictionary

    words = [f"word{letter}" for letter in string.ascii_lowercase]
    made = [(word, f"not {other} at all") for word, other in zip(words, [*words[1:], words[0]], strict=True)]
    monkeypatch.setattr(dictionary, "entries", lambda: iter(made))
    parts = dictionary.shared_out()
    held_out = {word for part in ("validation", "test") for word, _ in parts[part]}
    assert len(held_out) == 4
    assert all(not held_out & {word, *meaning.split()} for word, meaning in parts["train"])


def test_exercises_of_entries_have_said_what_they_ask_for_and_choices_are_of_the_document(monkeypatch):
    import dictionary
    from pages import GappedText, Page, Reader
    from whose_word import WhoseWord

    words = [f"{first}{last}ing" for first in "bcdfg" for last in string.ascii_lowercase]
    made = [(word, f"to {word[:2]} it as well") for word in words]
    monkeypatch.setattr(dictionary, "entries", lambda: iter(made))
    corpus, kinds = WhoseWord(is_tiny=True), set()
    reader, training = Reader(corpus), {word for word, _ in corpus.entries["train"]}
    for index in range(60):
        found = corpus.exercise(index)
        if isinstance(found, Page):
            for question in found.questions:
                kinds.add(question.kind)
                assert f" {question.answer}" in question.text
        else:
            assert isinstance(found, GappedText)
            for start, end in found.gaps:
                said = found.text[start:end]
                is_word = said in training
                kinds.add(f"gap for a {'definition' if is_word else 'headword'}")
                near = found.text[:start].endswith(f"{said}: ") if is_word else found.text[end:].startswith(f": {said}")
                assert near, found
        assert any(label != IGNORE_INDEX for label in reader.exercise(index).labels)
    assert kinds == {"definition", "headword", "gap for a definition", "gap for a headword"}
    for asked in reader.pages("test", 8, in_sight=False):
        # What does not fit into a slot cannot be chosen.
        assert all(1 < len(slots) <= 4 and slots.count(slots[0]) == 1 for slots in asked.choices)


# Whole scripts ------------------------------------------------------------------------------------------------------


def smoked(script, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(FOLDER / script), "--smoke", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


@pytest.mark.slow
def test_english_runs_from_beginning_to_end():
    said = smoked("english.py")
    for way in ("memory", "without memory", "memory of a wrong document", "text in sight"):
        assert f"| smoke | 0 | test | none | {way} | " in said


@pytest.mark.slow
def test_whose_it_is_runs_from_beginning_to_end():
    said = smoked("whose.py", "--reader_steps", "4")
    assert "memory, exercises: " in said
    assert "| smoke | 0 | test | 4 | memory of a wrong document | " in said


@pytest.mark.slow
@pytest.mark.parametrize("study", ["whose_all.py", "among.py"])
def test_whose_it_is_of_all_kinds_runs_from_beginning_to_end(study):
    said = smoked(study, "--arms", "memory", "--reader_steps", "4", "--reads_on", "--whole_until", "0.5")
    assert "| smoke | 0 | test | 4 before, and beside | memory of a wrong document, facts alike | " in said


@pytest.mark.slow
def test_options_of_a_memory_are_refused_for_the_network_without_one():
    with pytest.raises(subprocess.CalledProcessError) as failed:
        smoked("whose_all.py", "--reader_steps", "4", "--reads_on")
    assert "--reads_on is for --arms memory alone" in failed.value.stderr


@pytest.mark.slow
def test_exercises_that_do_not_exist_are_refused_in_one_line():
    with pytest.raises(subprocess.CalledProcessError) as failed:
        smoked("english.py", "--reader_steps", "4")
    assert failed.value.stderr.strip().splitlines()[-1].startswith("reader_steps: english has no reading exercises")
    assert "Traceback" not in failed.value.stderr


@pytest.mark.slow
def test_the_dictionary_runs_from_beginning_to_end():
    import dictionary

    if not dictionary.is_installed():
        pytest.skip("dict-gcide is not installed")
    assert "| smoke | 0 | test | none | memory of a wrong document | " in smoked("dictionary.py")
    said = smoked("whose_word.py", "--arms", "memory", "--reader_steps", "4", "--reads_on", "--whole_until", "0.5")
    assert "| smoke | 0 | test | 4 before, and beside | memory of a wrong document | " in said
