"""Training on a device: a 4-bit base with an adapter, and a run that goes on after it was stopped."""

import importlib.util

import pytest
import torch
from torch.testing import assert_close

from memdlm.data.collate import Collator
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LoRAOptions, add_outer_lora, load_model
from memdlm.randomness import derive
from memdlm.training import MemDLMTrainer, TrainingArguments
from tiny import CONFIGS, MASK, PAD, random_ids, tiny

IDS = random_ids(2, 12)
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(8, 12)]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


# QLoRA ------------------------------------------------------------------------------------------------------------


def qlora(folder, device):
    """A 4-bit base with an adapter whose B is not zero, so that all gradients are there."""
    model = load_model(folder, device=device, load_in_4bit=True)
    model = add_outer_lora(model, LoRAOptions(r=4, lora_dropout=0.0), seed=0)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=derive("B", index)) * 0.1
                parameter.copy_(drawn.to(parameter.device, parameter.dtype))
    return model.train()


def qlora_step(folder, device):
    """Return the losses of a write, an outer loss, and the adapter's gradients."""
    model = qlora(folder, device)
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    config = MemoryConfig(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=8.0, inner_lr=1.0, per_sample=False)
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    with memory.write(IDS.to(device), generator=derive("write")) as written:
        loss = model(IDS.to(device)).logits.log_softmax(-1)[..., 5].mean()
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(gradient is not None for gradient in gradients.values())
    return {"losses": written.losses, "loss": loss.detach(), **gradients}


@needs_bitsandbytes
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_qlora_step(family, device, tmp_path):
    """Packed on either, a base holds the same 4-bit numbers, up to the rounding of their scales."""
    tiny(family).save_pretrained(tmp_path)
    found, expected = qlora_step(tmp_path, device), qlora_step(tmp_path, torch.device("cpu"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name].cpu(), value, rtol=0, atol=2e-2 * value.abs().max().item() + 1e-6)


# Resuming ---------------------------------------------------------------------------------------------------------


def trainer_of(device, folder, *, bf16, seed=0):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        use_cpu=device.type == "cpu",
        bf16=bf16,
        report_to=[],
        disable_tqdm=True,
        mem_enabled=True,
        mem_inner_layer_fraction=0.5,
        mem_inner_rank=4,
        mem_inner_alpha=8.0,
    )
    # Several cards in one process would become torch's DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return MemDLMTrainer(
        tiny("llada2", seed=seed),
        arguments,
        mask_token_id=MASK,
        train_dataset=ROWS,
        data_collator=Collator(pad_token_id=PAD),
    )


def ends_of(device, folder, **options):
    """Return the weights after four steps in one go, and after two steps and two more of another trainer."""
    whole = trainer_of(device, folder / "whole", **options)
    whole.train()
    again = trainer_of(device, folder / "again", seed=7, **options)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    return whole.model.state_dict(), again.model.state_dict()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_ends_where_the_whole_one_does(bf16, device, tmp_path):
    """On a GPU within a tenth of a step's largest change: atomic additions round in another order each time, and AdamW
    divides by the gradient's size, so that a tiny gradient's last bit counts. On the CPU bit for bit."""
    whole, again = ends_of(device, tmp_path, bf16=bf16)
    atol = 1e-3 if device.type == "cuda" else 0
    for name, value in whole.items():
        assert_close(again[name], value, rtol=0, atol=atol)


@pytest.fixture
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Backward passes of the fused attention kernels add atomically.
    fused = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(fused[0])
    torch.backends.cuda.enable_mem_efficient_sdp(fused[1])


@pytest.mark.usefixtures("_deterministic")
def test_with_deterministic_algorithms_it_does_so_bit_for_bit(device, tmp_path):
    whole, again = ends_of(device, tmp_path, bf16=False)
    assert all(again[name].equal(value) for name, value in whole.items())
