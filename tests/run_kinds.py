"""Small runs of every kind: family, what is trained, and what the memory does; as the tests of resuming need them."""

import dataclasses

from memdlm.data.collate import Collator
from memdlm.memory import MemoryConfig
from memdlm.models import LoRAOptions, add_outer_lora, load_model
from memdlm.training import MemDLMTrainer, TrainingArguments
from tiny import MASK, PAD, random_ids, tiny

ROWS = [{"input_ids": row, "labels": [-100] * 5 + row[5:]} for row in random_ids(12, 12).tolist()]
TRAINED = ("full", "LoRA", "QLoRA")
SHAPE = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0}
# Every other step writes in chunks.
RECALL = MemoryConfig.recall(**SHAPE, strides=2, chunk_length=4, chunk_share=0.5)
MEMORY = {
    "off": {},
    "on": {"mem_enabled": True, "mem_inner_layer_fraction": 0.5, "mem_inner_rank": 4},
    "learned": {
        "mem_enabled": True,
        **{f"mem_{field.name}": getattr(RECALL, field.name) for field in dataclasses.fields(RECALL)},
    },
}
WITH_CONTEXTS = {**MEMORY["learned"], "mem_write_source": "context"}
"""As `learned`; two rows of three have nothing to be written."""
CONTEXT_ROWS = [
    row | {"context_ids": ids if index % 3 == 0 else []}
    for index, (row, ids) in enumerate(zip(ROWS, random_ids(12, 9, 5).tolist(), strict=True))
]


def new_model(folder, family, trained, seed=0):
    """Load the base of `family`, which is made on first use, and make of it what is `trained`."""
    base = folder / f"base-{family}"
    if not base.exists():
        (tiny(family) if isinstance(family, str) else family()).save_pretrained(base)
    model = load_model(base, load_in_4bit=trained == "QLoRA")
    if trained == "full":
        return model
    return add_outer_lora(model, LoRAOptions(r=4, lora_dropout=0.0), seed=seed)


def trainer_of(model, out, memory="off", rows=None, **options):
    """Return a trainer of three steps that saves at each; `memory` is one of MEMORY, or "contexts"."""
    if rows is None:
        rows = CONTEXT_ROWS if memory == "contexts" else ROWS
    kind = (MEMORY | {"contexts": WITH_CONTEXTS})[memory]
    settings = {
        **{"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
        **{"save_strategy": "steps", "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True},
    }
    arguments = TrainingArguments(output_dir=str(out), **{**settings, **kind, **options})
    return MemDLMTrainer(
        model,
        arguments,
        mask_token_id=MASK,
        train_dataset=rows,
        eval_dataset=[rows[index] for index in range(4)],
        data_collator=Collator(pad_token_id=PAD),
    )


def state(trainer):
    """Everything that a run trains: the model's tensors and what its memory has learned."""
    found = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    if trainer._learned is not None:
        found |= {f"memory.{name}": tensor.clone() for name, tensor in trainer.memory.learned.tensors().items()}
    return found


def is_same(one, other):
    """Whether two states are alike to the bit, dtypes included."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one
    )


def losses(trainer):
    """Return what was logged at every step, apart from speed."""
    return [
        {name: value for name, value in entry.items() if "per_second" not in name}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
