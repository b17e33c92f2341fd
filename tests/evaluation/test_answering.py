"""Answers and likelihoods of an evaluation do not depend on who shares the batch, and cost what the ledger says."""

import logging
import math

import pytest
import torch

from memdlm.data import build_word_tokenizer
from memdlm.errors import ConfigError, DataError, MemoryFileError
from memdlm.evaluation import answering
from memdlm.evaluation.answering import Answerer, Question, numbered
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.evaluation.identity import settings_identity
from memdlm.inference import score
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import SmallDLMConfig, build_model
from memdlm.randomness import derive
from tiny import CONFIGS

WORDS = [f"w{index}" for index in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(WORDS)


def answerer(tokenizer, batch_size=1, **arguments):
    config = SmallDLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.3
    )
    return Answerer(
        model=build_model(config, seed=0).double().eval(),
        tokenizer=tokenizer,
        settings=parse_arguments({"pretrained": "x", **arguments}),
        batch_size=batch_size,
    )


def questions(count=7):
    texts = [" ".join(WORDS[(3 * i + j) % 20] for j in range(2 + 5 * i % 11)) for i in range(count)]
    return [Question(context=text, gen_kwargs={"max_gen_toks": 3 + i % 2}, key=str(i)) for i, text in enumerate(texts)]


@pytest.mark.parametrize("memory", [{}, {"mem_enabled": True}], ids=["memory off", "memory on"])
def test_answers_do_not_depend_on_the_batch(tokenizer, memory):
    alone = answerer(tokenizer, 1, **memory).answer(questions())
    for batch_size in (3, 8):
        together = answerer(tokenizer, batch_size, **memory)
        told = {}
        assert together.answer(questions(), told.__setitem__) == alone
        assert [told[index] for index in range(7)] == alone
    # As two processes share them out.
    halves = [answerer(tokenizer, 3, **memory).answer(questions()[rank::2]) for rank in range(2)]
    assert [halves[index % 2][index // 2] for index in range(7)] == alone


def test_a_saved_memory_is_read_for_every_request(tokenizer, tmp_path):
    bare = answerer(tokenizer, mc_num=4, mc_batch_size=4)
    config = MemoryConfig(inner_lr=1.0, inner_rank=4)
    written = ParametricMemory(bare.model, config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    with written.write(torch.tensor([tokenizer("w1 w2 w3 w9 w8 w4")["input_ids"]])):
        written.save(tmp_path / "a.mem")
    reading = answerer(tokenizer, 3, mc_num=4, mc_batch_size=4, memory=str(tmp_path / "a.mem"))
    pairs = [reading.pair("w1 w2", " w3 w9"), reading.pair("w5", " w6")]
    without = [each.nll for each in bare.score(pairs)]
    with written.recall(tmp_path / "a.mem"):
        expected, answers = [each.nll for each in bare.score(pairs)], bare.answer(questions())
    assert [each.nll for each in reading.score(pairs)] == expected
    assert reading.answer(questions()) == answers
    assert all(one != other for one, other in zip(expected, without, strict=True))
    assert [each.nll for each in bare.score(pairs)] == without
    settings = parse_arguments({"pretrained": str(tmp_path), "memory": str(tmp_path / "a.mem")})
    before = settings_identity(settings)
    with written.write(torch.tensor([tokenizer("w1 w2 w7")["input_ids"]])):
        written.save(tmp_path / "a.mem")
    assert settings_identity(settings) != before, "another memory in its place has answers of its own"
    with pytest.raises(ConfigError, match="exclude each other"):
        parse_arguments({"pretrained": "x", "memory": "a.mem", "mem_enabled": True})
    with pytest.raises(MemoryFileError, match="there is no such folder"):
        answerer(tokenizer, memory=str(tmp_path / "none.mem"))


def test_memory_changes_something_and_its_seed_too(tokenizer):
    def nll(**arguments):
        one = answerer(tokenizer, mc_num=32, **arguments)
        return one.score([one.pair("w1 w2 w3 w4 w5", " w6 w7")])[0].nll

    assert nll() == nll() != nll(mem_enabled=True, mem_inner_lr=1.0)
    assert nll(request_seed=1) != nll()


def test_stop_texts_and_lengths_are_honoured(tokenizer):
    one = answerer(tokenizer)
    whole = one.answer([Question(context="w1 w2", gen_kwargs={"max_gen_toks": 6}, key="0")])[0].split()
    assert 1 < len(whole) <= 6
    until = {"max_gen_toks": 6, "until": whole[1]}
    assert (
        one.answer([Question(context="w1 w2", gen_kwargs=until, key="0")])[0].split() == whole[: whole.index(whole[1])]
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_long_prompts_lose_their_beginning_and_it_is_said(tokenizer, batch_size, caplog):
    long, end = " ".join(WORDS), " ".join(WORDS[-6:])
    one = answerer(tokenizer, batch_size, max_length=10)
    kwargs = {"max_gen_toks": 4}
    with caplog.at_level(logging.WARNING):
        answers = one.answer([Question(context=text, gen_kwargs=kwargs, key="0") for text in (long, end)])
    assert answers[0] == answers[1]
    assert one.ledger.truncated == 1
    assert "prompts longer than max_length 10 lost their beginning: 1" in caplog.text
    assert one.pair(long, " w1").prompt == tuple(one.encode(long)[-9:])
    with pytest.raises(ConfigError, match="leaves no room for a prompt beside 10 new tokens"):
        one.answer([Question(context=long, gen_kwargs={"max_gen_toks": 10}, key="0")])
    with pytest.raises(ConfigError, match="a continuation has 20 tokens, max_length allows 10"):
        one.pair("w1", " " + long)


@pytest.mark.parametrize("memory", [{}, {"mem_enabled": True, "mem_inner_lr": 0.0001}], ids=["memory off", "memory on"])
def test_a_uniform_model_scores_the_vocabulary(tokenizer, memory):
    one = answerer(tokenizer, mc_num=64, mc_batch_size=16, **memory)
    with torch.no_grad():
        one.model.get_output_embeddings().weight.zero_()
    scorings = [one.pair("w1 w2", " w3"), one.pair("w1 w2", " w3 w4 w5 w6 w7"), *one.windows(" ".join(WORDS))]
    for scoring, scored in zip(scorings, one.score(scorings), strict=True):
        assert scored.nll == pytest.approx(len(scoring.target) * math.log(len(tokenizer)), rel=1e-6)
        assert not scored.is_greedy


def test_a_likelihood_is_that_of_score(tokenizer):
    one = answerer(tokenizer, mc_num=64, mc_batch_size=16)
    scoring = one.pair("w1 w2", " w3 w4")
    expected = score(
        one.model,
        torch.tensor(scoring.prompt),
        torch.tensor(scoring.target),
        64,
        generator=derive("evaluate", 0, "score", repr(scoring.prompt), repr(scoring.target)),
        mask_token_id=tokenizer.mask_token_id,
    )
    assert one.score([scoring])[0].nll == expected


def test_choices_share_one_write(tokenizer):
    one = answerer(tokenizer, mc_num=4, mem_enabled=True)
    pairs = [one.pair(context, f" {choice}") for context in ("w1 w2 w3", "w4 w5") for choice in ("w6", "w7", "w8 w9")]
    scored = one.score(pairs)
    assert (one.ledger.writes, one.ledger.written_tokens) == (2, 5)
    alone = answerer(tokenizer, mc_num=4, mem_enabled=True)
    assert [alone.score([each])[0].nll for each in reversed(pairs)] == [each.nll for each in reversed(scored)]


def test_windows_hold_every_token_once(tokenizer):
    one = answerer(tokenizer, max_length=6)
    windows = one.windows(" ".join(WORDS))
    assert [token for window in windows for token in window.target] == one.encode(" ".join(WORDS))
    assert all(len(window.prompt) + len(window.target) <= 6 for window in windows)
    assert all(window.written[-1:] == window.prompt and len(window.written) <= 6 for window in windows)
    assert one.windows("") == []


def test_the_greedy_check_is_decoding_one_token_per_step(tokenizer):
    one = answerer(tokenizer, mc_num=4, is_check_greedy=True)
    said = one.answer([Question(context="w1 w2", gen_kwargs={"max_gen_toks": 3}, key="0")])[0]
    other = " ".join(WORDS[(WORDS.index(word) + 1) % 20] for word in said.split())
    assert len(said.split()) == 3, "the answer has no special token, so that it can be written down"
    assert [each.is_greedy for each in one.score([one.pair("w1 w2", f" {text}") for text in (said, other)])] == [
        True,
        False,
    ]


def test_the_ledger_counts(tokenizer):
    one = answerer(tokenizer, 3, mem_enabled=True)
    one.answer([Question(context="w1 w2 w3", gen_kwargs={"max_gen_toks": 4}, key=str(i)) for i in range(3)])
    cost = one.ledger.summary()
    assert (cost["requests"], cost["writes"], cost["written_tokens"], cost["forward_passes"]) == (3, 3, 9, 4)
    assert 0 < cost["write_seconds"] < cost["seconds"]
    assert cost["write_ms_per_token"] == pytest.approx(1e3 * cost["write_seconds"] / 9)
    assert cost["peak_memory_bytes"] > 1e6


def test_the_peak_of_memory_begins_after_loading_on_the_models_own_card(tokenizer, monkeypatch):
    held = {"cuda:0": 99_000, "cuda:1": 70_000}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update({str(device): 10_000}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held[str(device)])
    ledger = answerer(tokenizer).ledger
    assert (ledger.summary()["peak_memory_of"], held) == ("process", {"cuda:0": 99_000, "cuda:1": 70_000})
    ledger.begin(torch.device("cuda:1"))
    held["cuda:1"] += 2_000
    cost = ledger.summary()
    assert (cost["peak_memory_bytes"], cost["peak_memory_of"]) == (12_000, "GPU")
    assert held["cuda:0"] == 99_000, "another card's peak is another program's"


def test_an_evaluation_begins_the_peak(tokenizer, monkeypatch):
    begun = []
    monkeypatch.setattr(answering.Ledger, "begin", lambda self, device: begun.append(device))
    answerer(tokenizer)
    assert begun == [torch.device("cpu")]


def test_empty_texts(tokenizer):
    one = answerer(tokenizer, mc_num=4)
    assert isinstance(one.answer([Question(context="", gen_kwargs={"max_gen_toks": 2}, key="0")])[0], str)
    assert one.pair("", "w1 w2").prompt == ()
    with pytest.raises(DataError, match="has no tokens"):
        one.pair("w1", "")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        answerer(tokenizer, 0)


def test_a_pair_is_split_at_the_words(tokenizer):
    one = answerer(tokenizer)
    assert one.encode_pair("w1 w2 ", "w3") == one.encode_pair("w1 w2", " w3") == (one.encode("w1 w2"), one.encode("w3"))


def test_repetitions_are_numbered():
    assert numbered(["a", "b", "a"]) == ["a#0", "b#0", "a#1"]


def scored_by(tokenizer, monkeypatch, is_shared, **arguments):
    """Likelihoods of six choices on two contexts of a tiny LLaDA2.x, and what they cost."""
    config = CONFIGS["llada2"]()
    config.vocab_size = len(tokenizer)
    one = Answerer(
        model=build_model(config, seed=0).double().eval(),
        tokenizer=tokenizer,
        settings=parse_arguments(
            {"pretrained": "x", "mc_num": 8, "mc_batch_size": 4, "mc_attention": "decode", "block_size": 4, **arguments}
        ),
    )
    monkeypatch.setattr(answering, "can_share", lambda model: is_shared)
    contexts = (" ".join(WORDS[:11]), " ".join(WORDS[5:8]))
    choices = ("w6", "w7 w8", "w1 w2 w3 w4 w5 w6")
    return one.score([one.pair(context, f" {choice}") for context in contexts for choice in choices]), one.ledger


@pytest.mark.parametrize("memory", [{}, {"mem_enabled": True, "mem_inner_lr": 1.0}], ids=["memory off", "memory on"])
def test_a_context_is_computed_once_for_all_its_choices(tokenizer, monkeypatch, memory):
    shared, cheap = scored_by(tokenizer, monkeypatch, True, is_check_greedy=True, **memory)
    plain, dear = scored_by(tokenizer, monkeypatch, False, is_check_greedy=True, **memory)
    for mine, theirs in zip(shared, plain, strict=True):
        assert mine.nll == pytest.approx(theirs.nll, rel=1e-10)
        assert mine.nll.stderr == pytest.approx(theirs.nll.stderr, rel=1e-6)
        assert mine.is_greedy == theirs.is_greedy
    # The first context has two finished blocks of four tokens, the second none; 9 tokens of choices, 8 copies each.
    assert dear.token_positions == 8 * (3 * (11 + 3) + 9 + 9)
    assert cheap.token_positions == 8 + 8 * (3 * (3 + 3) + 9 + 9)
    assert cheap.forward_passes == dear.forward_passes + 1


def test_decodings_attention_gives_another_number_and_is_refused_where_it_is_the_same(tokenizer, monkeypatch):
    decode, _ = scored_by(tokenizer, monkeypatch, True)
    full, _ = scored_by(tokenizer, monkeypatch, True, mc_attention="full", block_size=4)
    differs = [abs(a.nll - b.nll) > 1e-6 for a, b in zip(decode, full, strict=True)]
    assert differs == [True, True, True, False, True, True], "the fourth text is one block: all of it is seen"
    one = answerer(tokenizer, mc_attention="decode")
    with pytest.raises(ConfigError, match="mc_attention='decode' has no effect"):
        one.score([one.pair("w1 w2", " w3")])
