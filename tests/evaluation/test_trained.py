"""A model that learned to copy answers every question of the suite's own task, and at chance before it learned."""

import pytest
import torch

from memdlm.data import Collator, KeyValueRecall, build_word_tokenizer, encode_chat
from memdlm.evaluation.answering import Answerer, Question
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.evaluation.longctx import documents_of, process_results
from memdlm.evaluation.recall import recall
from memdlm.models import SmallDLMConfig, build_model
from memdlm.training import MemDLMTrainer, TrainingArguments

TASK = KeyValueRecall(wording="symbols", num_pairs=4, num_keys=12, num_values=12, num_questions=4)


def hits(task, model, tokenizer, length, count, **arguments):
    """Whether each question of the suite's contexts is answered, by the requests that lm-eval makes."""
    one = Answerer(
        model=model.eval(),
        tokenizer=tokenizer,
        settings=parse_arguments({"pretrained": "x", **arguments}),
        batch_size=64,
    )
    documents = [
        document
        for index in range(count)
        for document in documents_of(task, length, ("test", task.name, length, index), lambda text: len(text.split()))
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
    return [process_results(document, [text])["exact_match"] for document, text in pairs]


def accuracy(model, tokenizer, length, **arguments):
    found = hits(TASK, model, tokenizer, length, 50, **arguments)
    return sum(found) / len(found)


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


def test_questions_asked_alone_are_answered_as_by_the_harness():
    """One by one: the demo's scoring and lm-eval's requests agree on every question, right or wrong."""
    task = KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=3, num_questions=2)
    tokenizer = build_word_tokenizer(task.words())
    config = SmallDLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, initializer_range=0.3
    )
    model = build_model(config, seed=3).double().eval()
    with torch.no_grad():  # so that it guesses among values, and is right now and then
        likely = tokenizer.convert_tokens_to_ids([*(f"v{index}" for index in range(3)), tokenizer.eos_token])
        model.get_output_embeddings().weight[likely] *= 10
    samples = task.records(60, 14, seed="test")
    alone = [one for sample in samples for one in sample.alone()]
    answered = hits(task, model, tokenizer, 14, 60)
    scored = [recall(model, tokenizer, [one], steps=8).correct for one in alone]
    assert scored == answered
    assert 0 < sum(scored) < len(scored)
    assert recall(model, tokenizer, alone, steps=8).correct == sum(answered)
    assert [one.answers for one in alone] == [(answer,) for sample in samples for answer in sample.answers]
