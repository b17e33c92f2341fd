"""The Trainer: how a step is cut up changes nothing, metrics are honest, and memory stays out of the optimizer."""

import copy
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from memdlm.data import Collator
from memdlm.diffusion import Linear, normalise
from memdlm.errors import ConfigError
from memdlm.models import LoRAOptions, SmallDLMConfig, add_outer_lora, build_model
from memdlm.randomness import derive
from memdlm.training import MemDLMTrainer, TrainingArguments, memory_of, noise_batch, score
from memdlm.training.noise import evaluation_noise
from memdlm.training.trainer import BARE_EVERY
from tiny import MASK, PAD, tiny

V = 32


class Tokenizer:
    """What the Trainer reads of one."""

    mask_token_id, pad_token_id = MASK, PAD

    def save_pretrained(self, folder):
        return ()


def rows_of(count, length=12, prompt=4, seed="rows"):
    generator = derive(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(0, PAD, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def trainer_of(folder, model, rows, evaluation=None, *, mask_token_id=MASK, **options):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return MemDLMTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **settings),
        mask_token_id=mask_token_id,
        train_dataset=rows,
        eval_dataset=evaluation,
        data_collator=Collator(PAD),
    )


def trained(folder, model, rows, **options):
    trainer = trainer_of(folder, copy.deepcopy(model), rows, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", ["small", "lladamoe"])
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_accumulation_changes_nothing_without_memory(family, norm, tmp_path):
    model, rows = tiny(family, torch.float64), rows_of(8)
    whole = trained(tmp_path, model, rows, per_device_train_batch_size=4, loss_norm_type=norm)
    parts = trained(
        tmp_path,
        model,
        rows,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        loss_norm_type=norm,
    )
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert_close(one, other, rtol=0, atol=1e-9, msg=name)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, parts)]
    norms = [[e["grad_norm"] for e in t.state.log_history if "loss" in e] for t in (whole, parts)]
    assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert_close(norms[0], norms[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory", [False, True])
def test_the_same_seed_trains_the_same_model(memory, tmp_path):
    model, rows = tiny("small"), rows_of(8)
    first = trained(tmp_path, model, rows, mem_enabled=memory)
    torch.rand(7)  # whatever the caller draws in between
    second = trained(tmp_path, model, rows, mem_enabled=memory)
    other = trained(tmp_path, model, rows, mem_enabled=memory, seed=1)
    assert all(a.equal(b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))


def test_memory_leaves_the_optimizer_and_the_state_dict_alone(tmp_path):
    model, rows = tiny("small"), rows_of(8)
    plain, written = (trained(tmp_path, model, rows, mem_enabled=on) for on in (False, True))
    for one, other in zip(plain.optimizer.param_groups, written.optimizer.param_groups, strict=True):
        assert [p.shape for p in one["params"]] == [p.shape for p in other["params"]]
    assert list(plain.model.state_dict()) == list(written.model.state_dict())
    assert [n for n, _ in plain.model.named_parameters()] == [n for n, _ in written.model.named_parameters()]


def test_the_clipped_norm_is_that_of_the_models_own_gradient(tmp_path):
    """With memory on, what is logged as the gradient norm has no inner gradient in it."""
    model, rows = tiny("small"), rows_of(4)
    seen = []

    class Watching(MemDLMTrainer):
        def training_step(self, network, inputs, num_items_in_batch=None):
            loss = super().training_step(network, inputs, num_items_in_batch)
            squares = [p.grad.double().square().sum() for p in network.parameters() if p.grad is not None]
            seen.append(torch.stack(squares).sum().sqrt().item())
            return loss

    trainer = trainer_of(tmp_path, copy.deepcopy(model), rows, mem_enabled=True, max_steps=1)
    trainer.__class__ = Watching
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert_close(logged, seen, rtol=1e-5, atol=0)


def test_metrics_are_the_bound_per_maskable_token_without_and_with_memory(tmp_path):
    """On a model that predicts all tokens alike, every bound is known: the weight's mean times ln V."""
    model = tiny("small")
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = rows_of(8)
    trainer = trainer_of(tmp_path, model, rows, rows, mem_enabled=True)
    metrics = trainer.evaluate()
    batch = Collator(PAD)(rows)
    noised = noise_batch(
        batch,
        *evaluation_noise(trainer.args.seed, range(len(rows)), batch["input_ids"].shape),
        schedule=Linear(),
        epsilon=1e-3,
        mask_token_id=MASK,
        spare_padding=False,
    )
    share = noised.noised.is_masked.sum(1) / (noised.noised.t + 1e-6)
    assert_close(metrics["eval_nll"], (share.sum() * math.log(V) / noised.is_maskable.sum()).item(), rtol=1e-5, atol=0)
    assert_close(metrics["eval_ppl"], math.exp(metrics["eval_nll"]))
    assert_close(metrics["eval_nll_memory"], metrics["eval_nll"], rtol=1e-5, atol=0)  # a zero head has no gradient


def test_evaluation_uses_the_same_noise_every_time_and_disturbs_nothing(tmp_path):
    model, rows = tiny("small"), rows_of(8)
    trainer = trainer_of(tmp_path, copy.deepcopy(model), rows, rows, mem_enabled=True)
    first, second = trainer.evaluate(), trainer.evaluate()
    for name in ("eval_loss", "eval_nll", "eval_nll_memory"):
        assert first[name] == second[name]
    without = trained(tmp_path, model, rows)
    with_evaluation = trained(tmp_path, model, rows, evaluation=rows, eval_strategy="steps", eval_steps=1)
    assert all(a.equal(b) for a, b in zip(without.model.parameters(), with_evaluation.model.parameters(), strict=True))


def history_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_training_logs_the_bound_without_memory_beside_the_one_with(tmp_path):
    options = {"mem_enabled": True, "max_steps": 10, "logging_steps": 5}
    logs = history_of(trained(tmp_path, tiny("small"), rows_of(8), **options))
    assert len(logs) == 2
    for entry in logs:
        assert entry["nll"] > 0
        assert entry["ppl"] == pytest.approx(math.exp(entry["nll"]))
        assert entry["nll_memory"] != entry["nll"]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ({"logging_steps": 1}, [1, 9, 17]),
        ({"logging_steps": 2}, [2, 10, 18]),
        ({"logging_steps": 3}, [3, 9, 18]),
        ({"logging_steps": 4}, [4, 12]),
        ({"logging_steps": 9}, [9, 18]),
        ({"logging_steps": 9, "logging_first_step": True}, [1, 9, 18]),
        ({"logging_strategy": "epoch"}, [1, 9, 17]),
        ({"logging_strategy": "no"}, []),
    ],
    ids=str,
)
def test_the_log_s_pass_without_memory_is_made_on_one_step_in_eight_at_most(interval, expected, tmp_path):
    trainer = trainer_of(tmp_path, tiny("small"), rows_of(8), mem_enabled=True, max_steps=18, **interval)
    passes, own = [], trainer._without_trace

    def counted():
        passes.append(trainer.state.global_step + 1)
        return own()

    trainer._without_trace = counted
    trainer.train()
    assert passes == expected
    assert all(later - earlier >= BARE_EVERY - 1 for earlier, later in itertools.pairwise(passes[1:]))


def test_what_is_logged_without_memory_is_the_loss_of_the_very_step(tmp_path):
    """Logged at every step, the figure of step 9 is that of the same step logged alone."""
    rows, options = rows_of(8), {"mem_enabled": True, "max_steps": 9}
    often, alone = (trained(tmp_path, tiny("small"), rows, logging_steps=n, **options) for n in (1, 9))
    found = {entry["step"]: entry["nll"] for entry in history_of(often) if "nll" in entry}
    assert sorted(found) == [1, 9]
    assert found[9] == history_of(alone)[0]["nll"]
    without = trained(tmp_path, tiny("small"), rows, max_steps=6)
    assert all("nll" in entry for entry in history_of(without)), "without memory it costs nothing"


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}], ids=str)
def test_what_is_logged_does_not_change_what_is_dropped(options, tmp_path):
    """A logged step makes one more pass, without memory, whose dropout takes numbers too."""
    rows, found = rows_of(8), []
    start = add_outer_lora(tiny("small", torch.float64), LoRAOptions(r=2, lora_dropout=0.5))
    for interval in (1, 2, 50):
        model = copy.deepcopy(start)
        trainer = trainer_of(tmp_path, model, rows, mem_enabled=True, max_steps=4, logging_steps=interval, **options)
        trainer.train()
        found.append([parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad])
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem_inner_lr": 1.0}, "mem_inner_lr=1.0 has no effect without memory; add mem_enabled=True"),
        ({"time_epsilon": 0.0}, "time_epsilon must be greater than 0"),
        ({"loss_norm_type": "tokens"}, "loss_norm_type: 'tokens' is not known. Possible: token, sequence, batch"),
        ({"mem_enabled": True, "mem_inner_lr": -1.0}, "mem_inner_lr must be greater than 0, got -1.0"),
        ({"mem_enabled": True, "mem_write_source": "answer"}, "mem_write_source: 'answer' is not known"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop labels"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_without_a_mask_token_there_is_no_training(tmp_path):
    with pytest.raises(ConfigError, match="mask_token_id: the tokenizer has no mask token and none was given"):
        trainer_of(tmp_path, tiny("small"), rows_of(4), mask_token_id=None)


# The leak: on tokens with nothing to learn, ln V is the honest floor. ------------------------------------------------


def held_out_with_memory(trainer, rows):
    """Cross-entropy per masked token of held-out `rows`, with the memory that training writes, batch by batch."""
    size, nats, count = trainer.args.per_device_train_batch_size, 0.0, 0
    for start in range(0, len(rows), size):
        batch = Collator(PAD)(rows[start : start + size])
        generator = derive("leak", start)
        noised = noise_batch(
            batch,
            torch.rand(size, generator=generator),
            torch.rand(batch["input_ids"].shape, generator=generator),
            schedule=Linear(),
            epsilon=1e-3,
            mask_token_id=trainer.mask_token_id,
            spare_padding=False,
        )
        with memory_of(trainer.memory, noised, pad_token_id=PAD, randomness=generator), torch.no_grad():
            lost = score(trainer.model, noised, schedule=Linear(), weighting="uniform")
        nats += normalise(lost.sums, lost.counts, "batch").item() * size
        count += int(noised.noised.is_masked.sum())
    return nats / count


@pytest.mark.slow
@pytest.mark.parametrize("source", ["prompt", "response"])
def test_only_a_memory_written_from_the_response_beats_the_entropy_of_random_tokens(source, tmp_path):
    """i.i.d. uniform tokens over V = 32: prompt-written memory must not, the published recipe does, go below ln 32."""
    vocabulary = V + 2  # the mask and the padding are never drawn
    config = SmallDLMConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2
    )
    generator = derive("uniform tokens")
    tokens = [torch.randint(0, V, (16,), generator=generator).tolist() for _ in range(900)]
    rows = [{"input_ids": ids, "labels": [-100] * 8 + ids[8:]} for ids in tokens]
    trainer = trained(
        tmp_path,
        build_model(config, seed=0),
        rows[:600],
        mask_token_id=V,
        max_steps=500,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        logging_steps=500,
        mem_enabled=True,
        mem_write_source=source,
        mem_inner_layer_fraction=0.5,
    )
    trainer.model.eval()
    found, floor = held_out_with_memory(trainer, rows[600:]), math.log(V)
    if source == "prompt":
        assert found >= floor - 0.02
    else:
        assert found < floor - 0.2
