"""The replays can fail: on another recording, on one they do not understand, and on all but a tie."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import goldens
from goldens import Case, model, must_know, tensors
from inference import test_golden_sampler as sampler
from memdlm.diffusion import TokenSampler
from memory import test_golden_adapt as adapt
from models import test_golden_forward as forward
from ties import Sureness, is_tie
from training import test_golden_outer as outer

MASK, PLACE = 505, "model.layers.9.mlp.up_proj"
PUBLISHED = "model.transformer.blocks.9.up_proj"
HERE = Path(__file__).parent / "golden"
REFUSED = pytest.fail.Exception
LEARNING_RATE, SCALE = 0.5, 2.0


# A recording made here ------------------------------------------------------------------------------------------------


def write_by_hand(network, clean, states, start, *, shifted):
    """Cross-entropy at the masks, SGD on two matrices, each gradient clipped at 1; (losses, norms, A, B)."""
    a, b = start.clone(), torch.zeros(96, start.shape[0])
    losses, norms = [], []
    site = network.get_submodule(PLACE)
    for ids in states:
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        handle = site.register_forward_hook(lambda m, x, out, a=a, b=b: out + SCALE * x[0] @ a.T @ b.T)
        logits = network(ids).logits
        handle.remove()
        if shifted:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
        loss = torch.nn.functional.cross_entropy(logits[ids == MASK], clean[ids == MASK])
        gradients = torch.autograd.grad(loss, (a, b))
        losses.append(loss.item())
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        clipped = [g * (1 / (g.norm() + 1e-12)).clamp(max=1) for g in gradients]
        a, b = a - LEARNING_RATE * clipped[0], b - LEARNING_RATE * clipped[1]
    return losses, norms, a.detach(), b.detach()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a recording of two epochs, each with states of its own, under the shift or without."""
    # Files are remembered by the family, so every test has one of its own.
    folder = tmp_path / tmp_path.name

    def make(*, shifted, num_states):
        folder.mkdir()
        (folder / "checkpoint").symlink_to(HERE / "llada" / "checkpoint")
        for file in ("inputs.safetensors", "inner_A0.safetensors"):
            shutil.copy(HERE / "llada" / file, folder)
        inputs, network = tensors("llada", "inputs.safetensors"), model("llada")
        clean, is_maskable = inputs["input_ids"], inputs["labels"] != -100
        generator = torch.Generator().manual_seed(3)
        states = [
            clean.masked_fill(is_maskable & (torch.rand(clean.shape, generator=generator) < share), MASK)
            for share in (0.5, 0.3, 0.6, 0.2)
        ]
        start = tensors("llada", "inner_A0.safetensors")[f"{PUBLISHED}.mem_inner_A"]
        losses, norms, a, b = write_by_hand(network, clean, states, start, shifted=shifted)
        data = {f"final/{PUBLISHED}.mem_inner_A": a, f"final/{PUBLISHED}.mem_inner_B": b}
        for k, ids in enumerate(states[:num_states]):
            data |= {f"step{k}/input_ids": ids.int(), f"step{k}/student_mask": (ids == MASK).to(torch.uint8)}
            data |= {f"step{k}/t": (ids == MASK).sum(1) / is_maskable.sum(1)}
        handle = network.get_submodule(PLACE).register_forward_hook(lambda m, x, out: out + SCALE * x[0] @ a.T @ b.T)
        with torch.no_grad():
            data["logits_xt_masked"] = network(inputs["mem_noised_input_ids"]).logits[inputs["mem_masked_mask"]]
        handle.remove()
        save_file({k: v.contiguous() for k, v in data.items()}, folder / "adapt_epochs.safetensors")
        config = {
            **{"enabled": True, "num_inner_steps": 2, "num_inner_epochs": 2, "masking_strategy": "pmc"},
            **{"inner_lr": LEARNING_RATE, "inner_rank": 4, "inner_alpha": 8.0, "inner_layer_fraction": 0.1},
            **{"inner_target_modules": "up_proj"},
        }
        return {
            **{"config": config, "loss_weight_type": "uniform", "loss_norm_type": "token", "inputs": "train"},
            **{"right_shift_logits": shifted, "attention_mask": "None", "losses": losses, "grad_norms": norms},
            "num_inner_params": 2,
        }

    def case(*, shifted=True, num_states=4, **changes):
        record = make(shifted=shifted, num_states=num_states)
        (folder / "adapt.json").write_text(json.dumps({"epochs": record | changes}))
        monkeypatch.setattr(goldens, "ROOT", tmp_path)
        return Case(folder.name, "adapt:epochs")

    return case


@pytest.mark.parametrize("shifted", [False, True])
def test_a_write_of_two_epochs_is_replayed_state_by_state_and_under_its_shift(made, shifted):
    adapt.test_a_write_reproduces_the_published_one(made(shifted=shifted))


@pytest.mark.parametrize("changes", [{"right_shift_logits": False}, {"loss_norm_type": "batch"}], ids=str)
def test_another_setting_than_the_recorded_one_is_noticed(made, changes):
    with pytest.raises(AssertionError, match="not close"):
        adapt.test_a_write_reproduces_the_published_one(made(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_states": 3}, "3 states and 4 losses of 2 epochs do not fit"),
        ({"num_states": 0}, "its states were not recorded"),
        ({"attention_mask": "windowed(8)"}, r"no recorded attention mask windowed\(8\)"),
        ({"inputs": "other"}, "no recorded kind of inputs other"),
        ({"optimizer": "adam"}, "no recorded field optimizer"),
        ({"config": {"inner_momentum": 0.9}}, "no recorded option inner_momentum"),
        ({"config": {"enabled": False}}, "nothing was written"),
    ],
    ids=str,
)
def test_a_write_that_cannot_be_replayed_says_why(made, changes, message):
    case = made(**changes)
    with pytest.raises(REFUSED, match=rf"adapt:epochs cannot be replayed: .*{message}"):
        adapt.test_a_write_reproduces_the_published_one(case)


# What is not understood ----------------------------------------------------------------------------------------------


@pytest.fixture
def unknown_network(tmp_path, monkeypatch):
    """A folder in the layout whose network is of a family that nobody here knows."""
    folder = tmp_path / "novel"
    folder.mkdir()
    for file in ("inputs.safetensors", "forward.safetensors", "sampler.safetensors", "sampler.json", "outer.json"):
        shutil.copy(HERE / "llada" / file, folder)
    shutil.copytree(HERE / "llada" / "checkpoint", folder / "checkpoint")
    config = {"model_type": "novel", "architectures": ["NovelForDiffusion"]}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    save_file({"layer.weight": torch.zeros(2)}, folder / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(goldens, "ROOT", tmp_path)
    for module in (sampler, forward):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return "novel"


def test_an_unknown_network_fails_in_words(unknown_network):
    decoding, plain = (
        Case(unknown_network, each) for each in ("sampler:sample/a_eq_full", "outer:plain_scheduler_token")
    )
    runs = (
        lambda: forward.test_logits_under_every_recorded_mask(unknown_network, "sdpa"),
        lambda: forward.test_hidden_states_of_every_layer(unknown_network),
        lambda: sampler.test_every_canvas_equals_the_published_one(decoding, "none"),
        lambda: outer.test_outer_loss_and_gradients(plain),
    )
    for run in runs:
        with pytest.raises(
            REFUSED, match=r"novel cannot be replayed: its network, 'novel' \['NovelForDiffusion'\], is"
        ):
            run()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sample/a_eq_full", {"kwargs": {"gen_length": 4}}, "no recorded option gen_length"),
        ("gen/a", {"kwargs": {}}, "no recorded kind of decoding gen"),
        ("sample/a_eq_full", {"token_ids": {"eos": 3}}, "no recorded field token_ids"),
        ("sample/a_eq_full", {"kwargs": {"temperature": 0.5}}, "its random numbers were not recorded"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_decoding_that_is_not_understood_fails_in_words(name, change, message, monkeypatch):
    record = {"prompts": "eq", "kwargs": {}, "n_forward": 1} | change
    monkeypatch.setattr(Case, "record", property(lambda self: record))
    with pytest.raises(REFUSED, match=f"cannot be replayed: .*{message}"):
        sampler.test_every_canvas_equals_the_published_one(Case("llada", f"sampler:{name}"), "none")


def test_what_a_replay_does_not_know_is_named():
    must_know("x", ["a"], ["a", "b"])
    with pytest.raises(REFUSED, match="x cannot be replayed: this replay knows no recorded field b, c"):
        must_know("x", ["c", "a", "b"], ["a"])


# Ties ----------------------------------------------------------------------------------------------------------------

BEFORE = torch.tensor([[1, 5, 5, 5, 5]])
"""A canvas whose last four tokens are masked (5)."""
#         token 0    1    2    3    4  mask
LINES = [
    [0.0, 3.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 3.0, 0.0, 0.0, 0.0],
    [0.0, 2.5, 2.5, 0.0, 0.0, 0.0],
    [0.0, 0.0, 3.01, 0.0, 0.0, 0.0],
]


def stepped(**tokens):
    after = BEFORE.clone()
    for column, token in tokens.items():
        after[0, int(column[1:])] = token
    return after


def sureness(**rule):
    return Sureness(torch.tensor([1, 2, 3, 4]), torch.tensor(LINES), TokenSampler(mask_token_id=5, **rule))


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ({"c1": 1}, {"c2": 2}, True),  # two places, equally sure
        ({"c3": 1}, {"c3": 2}, True),  # one place, two equally likely tokens
        ({"c1": 1, "c4": 2}, {"c2": 2, "c4": 2}, True),
        ({"c4": 2}, {"c1": 1}, False),  # one place is surer
        ({"c1": 1}, {"c1": 3}, False),  # another token is less likely
        ({"c1": 1}, {"c2": 1}, False),
        ({"c1": 1}, {"c1": 1, "c2": 2}, False),  # more was committed
        ({"c4": 2}, {"c4": 2, "c0": 0}, False),  # a given token changed
    ],
    ids=str,
)
def test_a_tie_is_told_from_a_difference(mine, theirs, expected):
    assert is_tie(BEFORE, stepped(**mine), stepped(**theirs), sureness()) is expected
    assert is_tie(BEFORE, stepped(**theirs), stepped(**mine), sureness()) is expected


def test_postponed_tokens_tie_and_suppressed_ones_are_never_chosen():
    postponed = sureness(postpone=(1, 2))
    assert is_tie(BEFORE, stepped(c4=2), stepped(c1=1), postponed)
    assert not is_tie(BEFORE, stepped(c4=2), stepped(c1=4), postponed)
    assert not is_tie(BEFORE, stepped(c2=2), stepped(c1=1), sureness(suppress=(1,)))


POSTPONING = Case("llada", "sampler:sample/i_begin_suppress")
"""A decoding in which many predictions tie, at 0."""


def replay_of(monkeypatch, history):
    """Replay `history` as if it had been recorded for `POSTPONING`."""
    name = POSTPONING.name.split(":")[1]
    data = tensors("llada", "sampler.safetensors") | {f"{name}/histories": history, f"{name}/sequences": history[-1]}
    monkeypatch.setattr(sampler, "tensors", lambda family, file: data)
    sampler.test_every_canvas_equals_the_published_one(POSTPONING, "none")


@pytest.fixture(scope="module")
def decoding():
    """(our history, the step that first commits some of the predictions that tie, a column it takes, one it leaves, and
    what was predicted there)."""
    job = sampler.job_of(POSTPONING, cache="none")
    steps = list(job.steps())
    history = torch.stack([job.canvas.ids, *(step.ids for step in steps)])
    found = []
    for index, step in enumerate(steps):
        is_tied = step.confidence[0] == 0
        taken, left = (is_tied & step.is_new[0]).nonzero(), (is_tied & ~step.is_new[0]).nonzero()
        if len(taken) and len(left):
            found.append((index, taken[0], left[-1]))
    index, taken, left = found[0]
    with torch.no_grad():
        logits = job._denoiser().logits(history[index], left)
    return history, index, int(taken), int(left), int(logits[:, :MASK].argmax())


def test_a_replay_of_our_own_canvases_is_not_marked(decoding, monkeypatch):
    replay_of(monkeypatch, decoding[0])


def test_a_replay_that_differs_by_a_tie_is_marked(decoding, monkeypatch):
    history, index, taken, left, token = decoding
    history = history.clone()
    history[index + 1 :, 0, taken] = MASK
    history[index + 1 :, 0, left] = token
    with pytest.raises(pytest.xfail.Exception, match=rf"from step {index} on .* tie.*\[0, {taken}\]"):
        replay_of(monkeypatch, history)


def test_a_replay_that_differs_really_is_not(decoding, monkeypatch):
    history, index, taken, left, token = decoding
    # Another token than the likeliest; one token more than the step commits.
    for column, other in ((taken, (int(history[-1, 0, taken]) + 1) % 400), (left, token)):
        changed = history.clone()
        changed[index + 1 :, 0, column] = other
        with pytest.raises(REFUSED, match=f"^step {index}: "):
            replay_of(monkeypatch, changed)
