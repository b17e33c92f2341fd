"""Every command and every Python block of the README and the documentation is run, on tiny checkpoints.

A page is run from its top to its end in a folder of its own. `STANDS_FOR` says what the placeholders are, `SMALLER`
which flags make a command small, and `NOT_RUN` what cannot be run here, why, and what is checked instead.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import BertConfig, BertForMaskedLM, Qwen3Config, Qwen3ForCausalLM

from memdlm.cli import eval as evaluation
from memdlm.cli.main import COMMANDS, main
from memdlm.cli.names import NOT_HERE
from memdlm.data import KeyValueRecall, build_word_tokenizer, write_jsonl
from memdlm.data.tokenizer import PATTERNS, build_pattern_tokenizer
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.models import SmallDLMConfig, build_model
from memdlm.serving.ray_app.options import parsed
from tiny import A2D, CONFIGS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DEMO = "runs/demo/checkpoints"

STANDS_FOR = {
    "MODEL": f"{DEMO}/memdlm-seed0",
    "MDLM": f"{DEMO}/mdlm-seed0",
    "MEMDLM": f"{DEMO}/memdlm-seed0",
    "ADAPTER": "runs/lora",
    "LLADA": "models/GSAI-ML/LLaDA-8B-Base",
    "LLADA2": "models/inclusionAI/LLaDA2.1-mini",
    "DREAM": "models/Dream-org/Dream-v0-Instruct-7B",
    "SDAR": "models/JetLM/SDAR-1.7B-Chat",
    "A2D": "models/dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
    "kuleshov-group/mdlm-owt": "models/kuleshov-group/mdlm-owt",
    "RUN": "runs/lora",
    "ANOTHER_RUN": "runs/whole",
    "runs/ruler": "runs/lora",
    "runs/babilong_2k": "runs/whole",
    "held_out.jsonl": "chat.jsonl",
    "report.pdf": "report.md",
    "memories": ".",
    "tatsu-lab/alpaca[train:5000]": "tatsu-lab/alpaca[train:20]",
    "cuda": "cpu",
}
"""Placeholders of the documentation -> what the test puts there, all made by `workshop`.

Published names stay what they are: BASE_MODELS_DIR and BASE_DATASETS_DIR point to tiny checkpoints and data under them.
"""
SMALLER = {
    "preprocess": ["--num_proc", "1"],
    "train": ["--max_steps", "1", "--report_to", "none", "--disable_tqdm", "True"],
    "ask": ["--max_new_tokens", "4"],
    "exposure-bias": ["--steps", "2", "--num_samples", "2"],
    "eval": ["--limit", "1", "--metadata", '{"max_seq_lengths": [320], "num_samples": 1}'],
}
"""Flags of a command, in the place of those that a page gives."""


def smaller(words):
    """Return a command's words with those of SMALLER."""
    found, more = list(words), SMALLER.get(words[0], [])
    for flag, value in zip(more[::2], more[1::2], strict=True):
        if flag in found:
            found[found.index(flag) + 1] = value
        else:
            found += [flag, value]
    return found


PUBLISHED = {
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": "lladamoe",
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": "lladamoe",
    "inclusionAI/LLaDA2.1-mini": "llada2",
    "GSAI-ML/LLaDA-8B-Base": "llada",
    "Dream-org/Dream-v0-Instruct-7B": "dream",
    "JetLM/SDAR-1.7B-Chat": "sdar",
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": "a2d_qwen3",
    "kuleshov-group/mdlm-owt": "mdlm",
}
DATASETS = ("Yukang/LongAlpaca-12k", "tatsu-lab/alpaca")


# What stands behind the placeholders. -------------------------------------------------------------------------------


def sources(folder, tokenizer):
    """What `memdlm convert` reads: a decoder, and a masked model of 2019 with a vocabulary and no tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    decoder = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=len(tokenizer)))
    decoder.save_pretrained(folder / "Qwen/Qwen3-0.6B")
    tokenizer.save_pretrained(folder / "Qwen/Qwen3-0.6B")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"CNOFScnos()=#123.-~", "Br", "Cl", "[Na+]", "[O-]", ">>"]
    encoder = BertForMaskedLM(BertConfig(**sizes, vocab_size=len(tokens)))
    for place, model in (("rxnfp/models/transformers/bert_pretrained", encoder), ("minilm", encoder.base_model)):
        model.save_pretrained(folder / "real" / place)
        (folder / "real" / place / "vocab.txt").write_text("\n".join(tokens) + "\n")
    path = folder / "real/rxnfp/models/transformers/bert_pretrained/config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in ("model_type", "architectures")}))
    build_pattern_tokenizer(tokens, PATTERNS["smiles"]).save_pretrained(folder / "real" / "minilm")
    write_jsonl([{"text": "CC[O-].[Na+].BrCC>>CCOCC"}] * 4, folder / "reactions.jsonl")
    (folder / "reaction.txt").write_text("CC[O-].[Na+].BrCC>>CCOCC")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with tiny models, an adapter, data and the recipes, where the documentation's commands find them."""
    datasets = importlib.import_module("datasets")
    folder, task = tmp_path_factory.mktemp("workshop"), KeyValueRecall()
    tokenizer = build_word_tokenizer(task.words(), spells=True, sentences=True)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    for seed, name in enumerate(("mdlm-seed0", "memdlm-seed0", "recall-learned-to-be-written-seed0")):
        build_model(SmallDLMConfig(vocab_size=len(tokenizer), **sizes), seed=seed).save_pretrained(folder / DEMO / name)
        tokenizer.save_pretrained(folder / DEMO / name)
    rows = [{"messages": sample.messages} for sample in task.records(30, 30, seed=0)]
    write_jsonl(rows, folder / "chat.jsonl")
    write_jsonl(
        [{**row, "document": "Hugo likes tea. The grass is green."} for row in rows], folder / "documents.jsonl"
    )
    (folder / "report.md").write_text(rows[0]["messages"][0]["content"])
    (folder / "notes").mkdir()
    (folder / "notes" / "may.md").write_text(rows[1]["messages"][0]["content"])
    (folder / "notes" / "june.txt").write_text(rows[2]["messages"][0]["content"])
    write_jsonl([{"text": "Hugo likes tea."}] * 4, folder / "text.jsonl")
    write_jsonl([{"question": "Hugo likes", "answer": "tea"}], folder / "questions.jsonl")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mdm_mask|>", "<|MASK|>", "<|role_end|>"]})
    for name, family in PUBLISHED.items():
        config = {**CONFIGS, **A2D}[family]()
        config.update({"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0})
        if family == "llada":
            config.embedding_size = len(tokenizer)
        if family == "mdlm":
            config.mask_token_id = tokenizer.mask_token_id
        build_model(config, seed=0).save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    sources(folder, tokenizer)
    split = {"train": datasets.Dataset.from_list(rows[:26]), "test": datasets.Dataset.from_list(rows[26:])}
    for name in DATASETS:
        datasets.DatasetDict(split).save_to_disk(folder / "datasets" / name)
    shutil.copytree(ROOT / "src" / "memdlm" / "recipes", folder / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = ["train", "--model", f"{DEMO}/memdlm-seed0", "--dataset_args", "chat.jsonl", *SMALLER["train"]]
        assert main([*train, "--output_dir", "runs/whole"]) == 0
        assert main([*train, "--output_dir", "runs/lora", "--lora", "True"]) == 0
    return folder


@pytest.fixture
def page_folder(workshop, tmp_path, monkeypatch):
    """A copy of the workshop, as the working directory, where nothing comes from the network."""
    shutil.copytree(workshop, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("BASE_MODELS_DIR", str(tmp_path / "page" / "models"))
    monkeypatch.setenv("BASE_DATASETS_DIR", str(tmp_path / "page" / "datasets"))
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))
    return tmp_path / "page"


# Reading pages. -----------------------------------------------------------------------------------------------------


def blocks(path):
    """The (language, text) of every fenced block of a page, in order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", path.read_text(), flags=re.S | re.M)


def lines(text):
    """The commands of a bash block."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def filled(text):
    """`text` with every placeholder replaced by what stands for it."""
    names = "|".join(map(re.escape, STANDS_FOR))
    return re.sub(rf"(?<![\w./-])({names})(?![\w./-])", lambda match: STANDS_FOR[match[1]], text)


def words_of(line):
    return shlex.split(filled(line), comments=True)


# Running, and what is checked where that is not possible. -----------------------------------------------------------


def run(words):
    """Run one `memdlm` command in this process; a gate may refuse what a random model has written."""
    fine = (0, 1) if "--gate" in words else (0,)
    assert main(smaller(words)) in fine, shlex.join(words)


def known_target(words):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {word for word in words[1:] if "=" not in word} <= targets


def known_extra(words):
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    for word in words[2:]:
        assert not (named := re.fullmatch(r"memdlm\[(\w+)\]", word)) or named[1] in extras


def known_address(words):
    assert words[2] in (ROOT / "README.md").read_text()


def known_flags(words):
    text = (ROOT / words[1]).read_text()
    assert all(f'"{word}"' in text for word in words[2:] if word.startswith("--"))


def planned(words):
    """The run that a launcher would start, up to the loading of weights; and the launcher's own arguments."""
    if words[0] == "sbatch":
        at = next(index for index, word in enumerate(words) if word.endswith(".sh"))
        assert subprocess.run(["bash", "-n", ROOT / words[at]]).returncode == 0
    else:
        parser = importlib.import_module("accelerate.commands.launch").launch_command_parser()
        launched = parser.parse_args(words[2:])
        assert (launched.training_script, launched.module) == ("memdlm", True)
        assert launched.config_file is None or Path(launched.config_file).is_file()
        if launched.training_script_args[0] == "memorize":
            # Without the launcher, the same command is one process. test_memorize_launched.py starts two.
            return run(launched.training_script_args)
        at = words.index("train")
    run(["train", *words[at + 1 :], "--dry_run"])


def accepted(words):
    """An evaluation, up to the building of tasks: our parser, lm-eval's, and every argument of the model."""
    pytest.importorskip("lm_eval")
    if words[0] == "memdlm-eval":
        words = ["memdlm", "eval", "--model", "x", *words[words.index("--tasks") :]]
    parser = evaluation._parser()
    known, rest = parser.parse_known_args(words[2:])
    evaluation._check_rest(parser, evaluation._harness().flags(), rest)
    given = {key: value for key, value in vars(known).items() if key not in evaluation._PASSED_ON}
    if "--extra_model_args" in rest:
        given |= dict(pair.split("=") for pair in rest[rest.index("--extra_model_args") + 1].split(","))
    parse_arguments({"pretrained": known.model, **given})
    for text in (rest[i + 1] for i, word in enumerate(rest) if word == "--metadata"):
        assert json.loads(text)["max_seq_lengths"]


def understood(words):
    """A demo, up to its start."""
    module, seen = importlib.import_module("memdlm.cli.demo"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_demo", lambda plan, *rest, **more: seen.append(plan) or sys.exit(0))
        with pytest.raises(SystemExit):
            main(words[1:])
    assert seen


def known_script(words):
    """The environment that `make` writes by default has the script."""
    assert words[1] == re.search(r"^VENV \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1] + "/bin/activate"


def known_options(words):
    """A server, up to the loading of its model."""
    module, seen = importlib.import_module("memdlm.cli.serve"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "serve", lambda options, *rest: seen.append(options))
        run(words[1:])
    assert seen


def known_server(words):
    assert "http://127.0.0.1:8000/" in " ".join(words)


def known_arguments(words):
    """A Ray application, up to the start of Ray."""
    assert words[2] == "memdlm.serving.ray_app:app"
    # The argument has the name of a placeholder.
    given = [word.split("=", 1) for word in words[3:]]
    parsed({"memories" if name == STANDS_FOR["memories"] else name: value for name, value in given})


NOT_RUN = {
    "serve run": ("starts Ray; tests/serving/http/test_ray_slow.py does it", known_arguments),
    "memdlm serve": ("runs until it is stopped; tests/serving/http starts servers", known_options),
    "curl": ("needs a server; tests/serving/http/test_http_docs.py sends it to one", known_server),
    "git": ("fetches from the network", known_address),
    "source": ("tests/test_first_minutes.py activates an environment", known_script),
    "make": ("installs an environment, then runs what the tests run", known_target),
    "pip": ("fetches from the network", known_extra),
    "accelerate": ("starts processes on GPUs; the launch on CPUs is a slow test", planned),
    "sbatch": ("needs a cluster; tests/workflows/test_train_recipes.py runs the script's parts", planned),
    "python": ("a study of several minutes; tests/workflows/test_recall_study.py runs it small", known_flags),
    "memdlm-eval": ("importing lm-eval takes most of the fast tests' time, and tasks need the hub", accepted),
    "memdlm eval": ("the same; the tasks that make their own data are run by a slow test", accepted),
    "memdlm demo": ("takes minutes; tests/workflows/test_demo.py runs it", understood),
}
"""Commands that are not run here: why, and what is checked instead."""


def follow(line):
    """Run one command of a page, or check it."""
    words = words_of(line)
    if words[0] == "memdlm" and "|" in words:  # the README names several commands on one line
        assert {word for word in words[1:] if word != "|"} <= set(COMMANDS)
        return
    if words[0] == "echo":
        subprocess.run(line, shell=True, check=True)
        return
    for part in (" ".join(words[:2]), words[0]):
        if part in NOT_RUN:
            NOT_RUN[part][1](words[: words.index("&&")] if "&&" in words else words)
            return
    assert words[0] == "memdlm", f"no rule for {line!r}"
    if ">" in words:
        with open(words[-1], "w") as file, contextlib.redirect_stdout(file):
            run(words[1 : words.index(">")])
        return
    run(words[1:])


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=lambda path: path.stem)
def test_a_page_can_be_followed(path, page_folder, monkeypatch):
    names = {"__name__": "page"}
    for language, text in blocks(path):
        if language == "python" and path.name == "CONTRIBUTING.md":
            continue  # recipes that change the package: tests/test_contributing.py follows them in a copy
        if language == "python" and path.name == "serving.md":
            continue  # tests/serving/http/test_http_docs.py runs it against a server
        if language == "python":
            exec(compile(filled(text), str(path), "exec"), names)
            continue
        for line in lines(text):
            monkeypatch.setattr(sys, "stdin", io.StringIO("Hugo likes\n/memory on\nAnna likes\n/exit\n"))
            follow(line)


def slow_lines():
    everything = [
        line for path in PAGES for language, text in blocks(path) if language == "bash" for line in lines(text)
    ]
    for line in dict.fromkeys(everything):
        own_tasks = line.startswith("memdlm eval") and "--tasks memdlm_" in line
        if own_tasks or "accelerate/cpu.yaml" in line:
            yield line


@pytest.mark.slow
@pytest.mark.parametrize("line", slow_lines())
def test_a_slow_command_runs(line, page_folder):
    words = words_of(line)
    if words[0] == "memdlm":
        pytest.importorskip("lm_eval")
        run(words[1:])
    else:
        launcher = str(Path(sys.executable).with_name("accelerate"))
        done = subprocess.run([launcher, *words[1:], *SMALLER["train"]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


# What pages say. ----------------------------------------------------------------------------------------------------


def test_what_is_named_exists():
    """Memory options, and the tests of this repository."""
    options = evaluation._parser().format_help(everything=True)
    tests = {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for path in PAGES:
        text = path.read_text()
        assert all(
            f"--{flag} " in options for flag in re.findall(r"`(?:--)?(mem_\w+)", text) if flag not in NOT_HERE
        ), path
        assert set(re.findall(r"`(test_\w+)`", text)) <= tests, path


def test_links_lead_to_files_that_a_clone_has():
    """A file that lies here and was not committed is a dead link everywhere else."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    tracked = set(listed.split("\0"))
    links = [
        (path, link)
        for path in PAGES
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in link and not link.startswith("mailto:")
    ]
    assert links
    for path, link in links:
        target = (path.parent / link).resolve().relative_to(ROOT).as_posix()
        is_folder = any(name.startswith(f"{target}/") for name in tracked)
        assert target in tracked or is_folder, (path, link)


def test_every_command_has_its_options_on_the_site_and_every_page_its_place():
    text = (ROOT / "docs" / "options.md").read_text()
    assert set(re.findall(r"<!-- command: ([\w-]+) -->", text)) == set(COMMANDS)
    nav = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.relative_to(ROOT / "docs").as_posix() in nav


def test_every_public_name_is_on_an_api_page():
    """A function that is called like its module has to be asked for by its whole path."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        module = importlib.import_module("memdlm" if page.stem == "index" else f"memdlm.{page.stem}")
        asked = re.findall(r"^::: (\S+)", page.read_text(), re.M)
        if page.stem == "index":
            assert all(f"`{name}`" in page.read_text() for name in module.__all__)
            continue
        assert module.__name__ in asked
        listed = re.findall(r"^        - (\w+)$", page.read_text(), re.M)
        apart = {name.rsplit(".", 1)[1] for name in asked if name != module.__name__}
        assert sorted([*listed, *apart]) == sorted(module.__all__), "each once; a page begins with what people use"
        assert blocks(page)[0][0] == "python", "with an example"
        for name in module.__all__:
            if (ROOT / "src" / "memdlm" / page.stem / f"{name}.py").exists():
                assert f"{module.__name__}.{name}.{name}" in asked


def test_the_tables_of_the_site_come_from_the_code():
    pytest.importorskip("mkdocs")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        hooks = importlib.import_module("hooks")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    memory = hooks.config_table("memory")
    assert (
        "| `mem_inner_lr` | `0.1` | Learning rate of the inner SGD.<br><small>number > 0 <= 1000000.0</small> |"
        in memory
    )
    assert "<small>`none`, `inner`, `both`</small>" in memory
    merge = hooks.command_tables("merge")
    assert "| `--adapter` | required |" in merge
    assert "`--mem_inner_lr`" not in hooks.command_tables("generate")
    assert "`--preset`" in hooks.command_tables("generate")
    assert "| `memory` |" in hooks.import_table()
    page = SimpleNamespace(file=SimpleNamespace(src_uri="howto/x.md"))
    assert "(../changelog.md)" in hooks.on_page_markdown("[x](../../CHANGELOG.md)", page, None, None)
    with pytest.raises(hooks.PluginError, match="does not exist"):
        hooks.on_page_markdown("[x](../../nowhere.md)", page, None, None)
