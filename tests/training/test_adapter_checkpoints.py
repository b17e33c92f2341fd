"""The Trainer with an outer adapter: it saves the adapter alone, resumes from it, and trains on a 4-bit base."""

import peft
import pytest
import torch
from safetensors.torch import load_file

from memdlm.data.collate import Collator
from memdlm.errors import CheckpointError
from memdlm.models import LoRAOptions, add_outer_lora, load_model
from memdlm.models.lora.files import reload_outer_adapter
from memdlm.training import MemDLMTrainer, TrainingArguments
from tiny import MASK, PAD, random_ids, tiny

ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(8, 12)]


def new_model(folder, *, four_bit=False, seed=0, **options):
    if not (folder / "base").exists():
        tiny("lladamoe").save_pretrained(folder / "base")
    model = load_model(folder / "base", load_in_4bit=four_bit)
    return add_outer_lora(model, LoRAOptions(r=4, lora_dropout=0.0, **options), seed=seed)


def trainer_of(model, folder, steps, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        mem_enabled=True,
        mem_inner_layer_fraction=0.5,
        **options,
    )
    return MemDLMTrainer(
        model, arguments, mask_token_id=MASK, train_dataset=ROWS, data_collator=Collator(pad_token_id=PAD)
    )


def learned(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("four_bit", [False, True], ids=["full", "4-bit"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(four_bit, tmp_path):
    if four_bit:
        pytest.importorskip("bitsandbytes")
    whole = new_model(tmp_path, four_bit=four_bit)
    frozen = {name: value.clone() for name, value in whole.state_dict().items() if "lora_" not in name}
    trainer_of(whole, tmp_path / "whole", 4).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not list(checkpoint.glob("model*"))
    names = set(load_file(checkpoint / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.2.mlp.experts.3.down_proj.lora_B.weight" in names
    assert peft.LoraConfig.from_pretrained(checkpoint).base_model_name_or_path == str(tmp_path / "base")
    again = new_model(tmp_path, four_bit=four_bit, seed=7)
    trainer_of(again, tmp_path / "again", 4).train(resume_from_checkpoint=str(checkpoint))
    expected = learned(whole)
    assert expected.keys() == learned(again).keys()
    for name, value in learned(again).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert all(value.equal(frozen[name]) for name, value in whole.state_dict().items() if name in frozen)
    assert not all(value.equal(expected[name]) for name, value in learned(new_model(tmp_path)).items())


def test_the_final_folder_loads_by_name(tmp_path):
    model = new_model(tmp_path)
    trainer = trainer_of(model, tmp_path / "run", 2)
    trainer.train()
    trainer.save_model()
    ids = random_ids(2, 8)
    with torch.no_grad():
        assert load_model(tmp_path / "run")(ids).logits.equal(model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lora_alpha": 1.0}, "lora_alpha is 1, the model's 64"), ({"target_modules": "q_proj"}, "are missing|has no")],
)
def test_resuming_from_an_adapter_of_another_shape_is_refused(options, message, tmp_path):
    new_model(tmp_path, **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        reload_outer_adapter(new_model(tmp_path), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="the model has no outer adapter"):
        reload_outer_adapter(tiny("lladamoe"), tmp_path / "adapter")
