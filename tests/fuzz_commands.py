"""Random command lines, run in this process and in one folder: `python fuzz_commands.py FOLDER SEED COUNT`.

Everything that a command may write to lies in FOLDER: the working directory, the home, caches and temporary files.
Root becomes nobody first. Prints one JSON line per input that ends otherwise than in a status and one line.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
LIMIT = 120
"""Seconds per input, on a busy machine."""
NASTY = [
    "",
    " ",
    "0",
    "-1",
    "1",
    "3",
    "nan",
    "inf",
    "-inf",
    "1e30",
    "0.5",
    "99999999999999999999",
    "1" * 5000,
    "x",
    "None",
]
NASTY += [
    "true",
    "False",
    "[]",
    "{}",
    "[1,2]",
    "\u202e",
    "\x1b[31m",
    "\U0001f600",
    "\ud83d",
    "a\x00b"[:1],
    "=",
    "--",
    ",",
    "1,1,1",
]
PATHS = ["inputs/good", "inputs/moe", "inputs/llada2", "inputs/broken_json", "inputs/truncated", "inputs/swapped"]
PATHS += ["inputs/no_tokenizer", "inputs/huge", "inputs/hostile", "inputs/empty", "inputs/none", "inputs/rows.jsonl"]
PATHS += [
    "inputs/bad.jsonl",
    "inputs/text.txt",
    "inputs/binary.txt",
    "inputs/pipe",
    "inputs/memory",
    "inputs/bad_memory",
]
PATHS += [
    "inputs/run",
    "inputs/bad_run",
    "inputs/recipe.yaml",
    "inputs/bad.yaml",
    "inputs/adapter_alone",
    "inputs/rows.json",
]
OUTPUTS = ["out", "out/a", "new", "a.txt", "folder.mem", "[x]", ":bug:", "out/\u202e"]
KINDS = {
    bool: ["True", "False"],
    int: ["0", "1", "2", "4", "10000000"],
    float: ["0", "0.1", "0.5", "1", "3.5"],
    tuple: ["1", "400", "511", "512"],
}
FITTING: dict[str, list[str]] = {}
"""Values of the kind that an option takes."""
ENDED: Counter[str] = Counter()
IS_OUTPUT = ("output", "output_dir", "output_path", "trace", "out", "use_cache")
IS_PATH = ("model", "adapter", "dataset_args", "eval_dataset_args", "file", "memory", "questions", "base", "model2")
IS_PATH += ("adapter2", "preprocessed_dir", "tokenizer", "resume", "base_model_name_or_path", "vocabulary")


def confine(folder: Path) -> None:
    """Point everything that a command may write to into `folder`, and give up root."""
    for name in ("home", "cache", "tmp", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "MEMDLM_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "cache" / "hf"),
        "TMPDIR": str(folder / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLCONFIGDIR": str(folder / "cache"),
    }
    os.environ.pop("MEMDLM_DEBUG", None)
    os.chdir(folder / "work")
    prepare(Path("inputs"))
    if os.getuid() == 0:
        _preload()
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 65534, 65534, follow_symlinks=False)
        _become_nobody()


def _become_nobody() -> None:
    """Give up root, but for reading: Python itself may lie in root's home. Nothing of root's can be written."""
    libc, read_search = ctypes.CDLL(None), 2
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)(*[1 << read_search] * 3, 0, 0, 0))
    libc.prctl(47, 2, read_search, 0, 0)  # PR_CAP_AMBIENT_RAISE, for processes that are started


def _preload() -> None:
    """Import what nobody may not be allowed to read: Python itself may lie in root's home."""
    for name, (start, _) in options().items():
        outcome([name, *start])
        outcome([name, "--help"])
        outcome([name, *start, "--nonsense"])
    clean()
    for name in sorted(
        sys.stdlib_module_names - {"antigravity", "this", "idlelib", "turtle", "turtledemo", "__main__"}
    ):
        with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(name)


def prepare(inputs: Path) -> None:
    """Make models, memories, datasets and recipes, good and damaged."""
    inputs.mkdir()
    for name, family in (("good", "llada"), ("moe", "lladamoe"), ("llada2", "llada21")):
        shutil.copytree(GOLDEN / family / "checkpoint", inputs / name)
    for name in ("broken_json", "truncated", "swapped", "no_tokenizer", "huge", "hostile"):
        shutil.copytree(inputs / "good", inputs / name)
    (inputs / "broken_json" / "config.json").write_text('{"model_type": ')
    weights = next((inputs / "truncated").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copy(inputs / "moe" / "config.json", inputs / "swapped")
    for path in (inputs / "no_tokenizer").glob("tokenizer*"):
        path.unlink()
    config = json.loads((inputs / "huge" / "config.json").read_text())
    (inputs / "huge" / "config.json").write_text(json.dumps(config | {"n_layers": 10**7, "vocab_size": 10**12}))
    (inputs / "hostile" / "chat_template.jinja").write_text("{{ 'x' * 10**9 }}")
    (inputs / "empty").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"t{i} t1"}, {"role": "assistant", "content": "t2"}]}
        for i in range(4)
    ]
    (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (inputs / "rows.json").write_text(json.dumps(rows))
    (inputs / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}\n{"question": 3}\n[1]\n')
    (inputs / "text.txt").write_text("w1 w2 w3 w4 w5 w6")
    (inputs / "binary.txt").write_bytes(bytes(range(256)))
    os.mkfifo(inputs / "pipe")
    (inputs / "run").mkdir()
    history = [{"step": 1, "loss": 1.0}, {"step": 1, "eval_nll": 2.0}]
    (inputs / "run" / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": history}))
    (inputs / "bad_run").mkdir()
    (inputs / "bad_run" / "results_2026.json").write_text('{"config": [], "results": {"a": 1}}')
    (inputs / "recipe.yaml").write_text("model: inputs/good\ndataset_args: inputs/rows.jsonl\noutput_dir: out\n")
    (inputs / "bad.yaml").write_text("model:\nlearning_rate: .nan\n1: 2\nlora: [1]\n")
    (inputs / "adapter_alone").mkdir()
    (inputs / "adapter_alone" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": "x"}')
    from memdlm.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert (
            main(["memorize", "--model", "inputs/good", "--file", "inputs/text.txt", "--output", "inputs/memory"]) == 0
        )
        words = ["memorize", "--model", "inputs/good", "--file", "inputs/text.txt", "--seed", "1"]
        assert main([*words, "--output", "inputs/other_memory"]) == 0
    shutil.copytree(inputs / "memory", inputs / "bad_memory")
    file = next((inputs / "bad_memory").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])


def options() -> dict[str, tuple[list[str], list[str]]]:
    """Per command, what makes it run, and the names of its options."""
    from memdlm.evaluation.harness_options import HarnessOptions
    from memdlm.inference import GenerationConfig
    from memdlm.memory import MemoryConfig
    from memdlm.models.lora.adapters import LoRAOptions
    from memdlm.training.arguments import TrainingArguments
    from memdlm.workflows.runs.exposure_bias import BiasOptions
    from memdlm.workflows.runs.options import DataOptions, ModelOptions, RunOptions
    from memdlm.workflows.runs.preprocess import PreprocessOptions
    from memdlm.workflows.sessions.ask import AskOptions
    from memdlm.workflows.sessions.chat import ChatOptions
    from memdlm.workflows.sessions.combine import CombineOptions
    from memdlm.workflows.sessions.converting import ConvertOptions
    from memdlm.workflows.sessions.decoding import DecodingOptions
    from memdlm.workflows.sessions.memorize import MemorizeOptions

    def names(*configs, prefix=""):
        for config in configs:
            for field in dataclasses.fields(config):
                limits = field.metadata.get("limits") or {}
                FITTING[prefix + field.name] = list(
                    limits.get("choices") or KINDS.get(type(field.default), ["1", "0.5", "a"])
                )
        return [prefix + field.name for config in configs for field in dataclasses.fields(config)]

    memory = names(MemoryConfig, prefix="mem_")
    decoding = names(GenerationConfig)
    small = ["--model", "inputs/good", "--max_new_tokens", "2"]
    training = ["--max_steps", "1", "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no"]
    told = "max_steps num_train_epochs per_device_train_batch_size learning_rate seed warmup_steps weight_decay"
    told += " logging_steps gradient_accumulation_steps optim lr_scheduler_type bf16 save_steps eval_strategy"
    told += " max_grad_norm data_seed"
    assert set(told.split()) <= set(names(TrainingArguments))
    lm_eval = [
        "limit",
        "num_fewshot",
        "batch_size",
        "metadata",
        "gen_kwargs",
        "seed",
        "output_path",
        "use_cache",
        "device",
    ]
    lm_eval += ["samples", "system_instruction", "apply_chat_template", "cache_requests", "max_batch_size"]
    task = ["--tasks", "memdlm_kv", "--limit", "1", "--metadata", '{"max_seq_lengths": [40], "num_samples": 1}']
    return {
        "generate": ([*small, "w1 w2"], names(DecodingOptions) + decoding + memory),
        "infill": (["--model", "inputs/good", "w1 <|mdm_mask|>"], names(DecodingOptions) + decoding + ["blank"]),
        "chat": (small, names(DecodingOptions, ChatOptions) + decoding),
        "memorize": (
            ["--model", "inputs/good", "--file", "inputs/text.txt", "--output", "m.mem"],
            names(MemorizeOptions) + memory,
        ),
        "ask": ([*small, "--memory", "inputs/memory", "w1"], names(AskOptions) + decoding),
        "memory": (
            ["combine", "inputs/memory", "inputs/other_memory", "--output", "out"],
            [name for name in names(CombineOptions) if name != "model"],
        ),
        "info": (["inputs/good"], ["revision", "json", "mem_inner_rank", "mem_inner_layer_fraction"]),
        "preprocess": (
            ["--model", "inputs/good", "--dataset_args", "inputs/rows.jsonl", "--output_dir", "out"],
            names(PreprocessOptions),
        ),
        "train": (
            ["inputs/recipe.yaml", *training],
            names(ModelOptions, LoRAOptions, DataOptions, RunOptions) + told.split() + memory,
        ),
        "eval": (
            ["--model", "inputs/good", *task],
            names(HarnessOptions)[1:] + [name for name in decoding if name != "max_length"] + memory + lm_eval,
        ),
        "exposure-bias": (
            ["--model", "inputs/good", "--dataset_args", "inputs/rows.jsonl", "--steps", "2", "--output", "out"],
            names(BiasOptions) + memory,
        ),
        "merge": (["--adapter", "inputs/adapter_alone", "--output", "out"], ["base", "dtype", "device", "overwrite"]),
        "convert": (["--model", "inputs/good", "--output", "out"], names(ConvertOptions)),
        "report": (["inputs/run"], ["output"]),
        "recipes": (["llada_moe_1gpu_memdlm"], ["folder", "name"]),
        "completion": (["bash"], ["shell"]),
    }


def value(draw: random.Random, name: str) -> str:
    """Draw a value: half of the time of the kind that the option takes. Outputs stay where they are put."""
    if name in IS_OUTPUT:
        return draw.choice(OUTPUTS)
    if name in IS_PATH and draw.random() < 0.7:
        return draw.choice(PATHS)
    if name in FITTING and draw.random() < 0.6:
        return draw.choice(FITTING[name])
    return draw.choice(NASTY + PATHS[:3] + ["cuda", "cpu:7", "7", "10000000", "0.1"])


def command_line(draw: random.Random, known: dict[str, tuple[list[str], list[str]]]) -> list[str]:
    """Draw a command with some options, of which a few replace those that make it run."""
    name = draw.choice(list(known))
    start, names = known[name]
    words = list(start)
    for _ in range(draw.choice([1, 1, 2, 3])):
        option = draw.choice(names)
        told = value(draw, option)
        flag = f"--{option}"
        if flag in words and draw.random() < 0.9:
            words[words.index(flag) + 1] = told
        else:
            words = (
                [words[0], flag, told, *words[1:]]
                if name in ("train", "report", "info", "memory")
                else [flag, told, *words]
            )
    if draw.random() < 0.1:
        place = draw.randrange(len(words))
        if words[place - 1].removeprefix("--") not in IS_OUTPUT:
            words[place] = draw.choice([each for each in NASTY if each] + PATHS)
    return [name, *(word for word in words if ".." not in word and not word.startswith("/"))]


def state(folder: Path) -> str:
    """Return a digest of all that lies in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode("utf-8", "surrogateescape"))
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


class TooLong(BaseException):
    """An input that took more than its time."""


def outcome(argv: list[str]) -> str | None:
    """Run one command; returns what is wrong with how it ended, or None."""
    from memdlm.cli.main import main

    def stop(*_):
        raise TooLong

    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    earlier, sys.stdin = sys.stdin, io.StringIO("w1 w2\n/exit\n")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
    except SystemExit as exit_:
        status = exit_.code
    except TooLong:
        return f"more than {LIMIT} s"
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}"[:500]
    finally:
        signal.alarm(0)
        sys.stdin = earlier
    said = err.getvalue()
    ENDED[f"{argv[0]} {status}"] += 1
    if os.environ.get("FUZZ_SHOW"):
        print(json.dumps(argv)[:200], status, said.splitlines()[-1:], file=sys.stderr, flush=True)
    lines = [line for line in said.splitlines() if line.startswith(f"memdlm {argv[0]}: error: ")]
    if "Traceback" in said or "did not expect" in said:
        return said[-700:]
    if status not in (0, 1, 2):
        return f"status {status}"
    if status == 0 and lines:
        return f"status 0 with {lines}"
    if status == 2 and (len(lines) != 1 or said.splitlines()[-1] != lines[0]):
        return f"status 2, said {said[-500:]!r}"
    if any(ord(each) < 32 and each not in "\n\t\r" for each in out.getvalue()):
        return "control characters in the output"
    return None


def clean() -> None:
    """Remove what the last input left, except the inputs."""
    for path in Path(".").iterdir():
        if path.name != "inputs":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def main() -> None:
    """Run the inputs of one seed."""
    folder, seed, count = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    confine(folder)
    ENDED.clear()
    draw, known, before = random.Random(seed), options(), state(Path("inputs"))
    for _ in range(count):
        argv = command_line(draw, known)
        wrong = outcome(argv)
        if wrong is None and state(Path("inputs")) != before:
            wrong = "the inputs were changed"
        if wrong is not None:
            print(json.dumps({"argv": [word[:80] for word in argv], "wrong": wrong}), flush=True)
        clean()
    print(json.dumps({"done": count, "ended": ENDED}), flush=True)


if __name__ == "__main__":
    main()
