"""RULER, offline, in fresh processes, with a tokenizer that its generators can work with; slow: 500 samples per task.

BABILong and LongBench come from the hub; their loading path runs on local files in the hub's format.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memdlm.evaluation.answering import Answerer, Question
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.models import SmallDLMConfig, build_model, load_model, load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
wonderwords = pytest.importorskip("wonderwords")
pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[2] / "src"
LAUNCH = SOURCE / "memdlm" / "recipes" / "accelerate" / "cpu.yaml"
RUN = "import sys; from memdlm.cli.eval import stock; sys.exit(stock())"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model with byte-pair tokens of the words RULER writes: a third of a word each is too many."""
    folder = tmp_path_factory.mktemp("ruler") / "model"
    tasks = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    texts = [path.read_text() for path in sorted(tasks.glob("*.py"))]
    words = wonderwords.RandomWord()
    for kind in ("nouns", "adjectives", "verbs"):
        found = [str(word) for word in words.filter(include_parts_of_speech=[kind])]
        texts += [" " + " ".join(found), "\n".join(found)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|mask|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=16000, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0], mask_token=special[1]
    )
    config = SmallDLMConfig(vocab_size=len(wrapped), hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    build_model(config, seed=0).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def evaluate(checkpoint, out, tasks, arguments="", metadata=None, more=(), processes=1):
    metadata = {"max_seq_lengths": [1024]} if metadata is None else metadata
    out.mkdir(parents=True)
    (out / "run.py").write_text(RUN)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH), "--num_processes", str(processes)]
    launch += ["--main_process_port", str(free_port())]
    command = [
        sys.executable,
        *(launch if processes > 1 else ()),
        str(out / "run.py"),
        "--model",
        "memdlm",
        "--model_args",
        f"pretrained={checkpoint}{arguments}",
    ]
    command += ["--tasks", *tasks, "--metadata", json.dumps(metadata), "--limit", "3", "--output_path", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--log_samples", "--batch_size", "3", *more], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(out.glob("**/results_*.json")).read_text())
    samples = {
        re.fullmatch(r"samples_(.+)_\d{4}-.+", path.name)[1]: [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in out.glob("**/samples_*")
    }
    return results, samples


def test_ruler_runs_with_memory_off_and_on_and_in_any_batch(checkpoint, tmp_path):
    tasks = ["ruler_vt", "ruler_cwe", "niah_single_1"]
    found = {}
    for memory in (False, True):
        out = tmp_path / f"memory {memory}"
        results, samples = evaluate(
            checkpoint, out, tasks, f",mem_enabled={memory},mem_inner_rank=4,steps=4" if memory else ",steps=4"
        )
        assert set(results["results"]) == set(tasks)
        assert all(0 <= results["results"][task]["1024,none"] <= 1 for task in tasks)
        assert results["config"]["memdlm"]["cost"]["writes"] == (9 if memory else 0)
        found[memory] = samples
    given = [sample["arguments"]["gen_args_0"] for task in tasks for sample in found[True][task]]
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    answers = {}
    for batch_size in (1, 3, 8):
        settings = parse_arguments(
            {"pretrained": str(checkpoint), "steps": 4, "mem_enabled": True, "mem_inner_rank": 4}
        )
        one = Answerer(model=model, tokenizer=tokenizer, settings=settings, batch_size=batch_size)
        answers[batch_size] = one.answer(
            [
                Question(context=each["arg_0"], gen_kwargs=each["arg_1"], key=f"{index}")
                for index, each in enumerate(given)
            ]
        )
    assert answers[1] == answers[3] == answers[8]


def test_two_processes_give_the_results_of_one(checkpoint, tmp_path):
    """The tasks without a network that the test above leaves out, through accelerate's launcher."""
    tasks = ["ruler_fwe", "niah_multikey_2", "niah_multikey_3"]
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = ",mem_enabled=True,mem_inner_rank=4,steps=4"
        results, samples = evaluate(checkpoint, out, tasks, arguments, processes=processes)
        assert results["config"]["memdlm"]["processes"] == processes
        scores = {task: results["results"][task]["1024,none"] for task in tasks}
        answers = {
            task: sorted((each["doc_hash"], str(each["filtered_resps"])) for each in samples[task]) for task in tasks
        }
        assert all(len(each) == 3 for each in answers.values())
        found.append((scores, answers))
    assert found[0] == found[1]
    given = [each["arguments"]["gen_args_0"]["arg_0"] for task in tasks for each in samples[task]]
    assert all(400 < len(load_tokenizer(checkpoint)(text)["input_ids"]) <= 1024 for text in given)


def test_local_files_in_the_hubs_format_are_scored(checkpoint, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    stock = Path(lm_eval.__file__).parent / "tasks"
    longbench = {"question": "Who wrote it?", "context": "Ann wrote it.", "answers": ["Ann"], "length": 3,
                 "dataset": "hotpotqa", "language": "en", "all_classes": [], "_id": "0"}  # fmt: skip
    babilong = {"input": "Ann went to the hall.", "question": "Where is Ann?", "target": "hall"}
    for name, row in (("longbench", longbench), ("babilong", babilong)):
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    lines = "dataset_path: json\ndataset_name: null\ntag: []\n"
    (folder / "a.yaml").write_text(
        f"include: {stock}/longbench/hotpotqa.yaml\ntask: local_hotpotqa\n{lines}"
        f"dataset_kwargs: {{data_files: {{test: {folder}/longbench.jsonl}}}}\n"
    )
    (folder / "b.yaml").write_text(
        f"include: {stock}/babilong/babilong_qa1.yaml\ntask: local_babilong\n{lines}custom_dataset: null\n"
        f"dataset_kwargs: {{data_files: {{qa1: {folder}/babilong.jsonl}}}}\n"
    )
    tasks = ["local_hotpotqa", "local_babilong"]
    results, samples = evaluate(
        checkpoint, tmp_path / "out", tasks, ",mem_enabled=True,steps=2", {}, ["--include_path", str(folder)]
    )
    assert results["results"]["local_babilong"]["acc,none"] == 0
    assert any(key.startswith("qa_f1") for key in results["results"]["local_hotpotqa"])
    prompt = samples["local_babilong"][0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("Where is") == 3, "two examples and the question"
