"""A model that learned to copy answers every question of the suite's own task, and at chance before it learned."""

import pytest

from memdlm.data import Collator, KeyValueRecall, build_word_tokenizer, encode_chat
from memdlm.evaluation.answering import Answerer, Question
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.evaluation.longctx import documents_of, process_results
from memdlm.models import SmallDLMConfig, build_model
from memdlm.training import MemDLMTrainer, TrainingArguments

TASK = KeyValueRecall(num_pairs=4, num_keys=12, num_values=12, num_questions=4)


def accuracy(model, tokenizer, length, **arguments):
    one = Answerer(
        model=model.eval(),
        tokenizer=tokenizer,
        settings=parse_arguments({"pretrained": "x", **arguments}),
        batch_size=64,
    )
    documents = [
        document
        for index in range(50)
        for document in documents_of(TASK, length, ("test", TASK.name, length, index), lambda text: len(text.split()))
    ]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{each['context']} {each['question']}"}], tokenize=False
        )
        for each in documents
    ]
    questions = [
        Question(context=prompt, gen_kwargs={"max_gen_toks": 2}, key=str(index)) for index, prompt in enumerate(prompts)
    ]
    pairs = zip(documents, one.answer(questions), strict=True)
    return sum(process_results(document, [text])["exact_match"] for document, text in pairs) / len(documents)


@pytest.mark.slow
def test_training_takes_a_model_from_chance_to_all_answers(tmp_path):
    tokenizer = build_word_tokenizer(TASK.words())
    config = SmallDLMConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = build_model(config, seed=0)
    for memory in ({}, {"mem_enabled": True}):
        assert accuracy(model, tokenizer, 20, **memory) < 2 * TASK.chance
    encoded = [encode_chat(tokenizer, sample.messages, train_turns="all") for sample in TASK.records(2000, 20, "train")]
    trainer = MemDLMTrainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=600,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            warmup_steps=30,
            weight_decay=0.05,
            adam_beta2=0.95,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": each.input_ids, "labels": each.labels} for each in encoded],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    for memory in ({}, {"mem_enabled": True}):
        assert accuracy(model, tokenizer, 20, **memory) == 1.0
