"""Every command of the documentation is one that the commands accept."""

import json
import re
import shlex
from pathlib import Path

import pytest

from memdlm.cli import eval as evaluation
from memdlm.cli.ask import ask_parser
from memdlm.cli.main import COMMANDS
from memdlm.cli.memorize import memorize_parser
from memdlm.cli.parsing import DataclassParser
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.workflows.exposure_bias import BiasOptions

ROOT = Path(__file__).parents[1]


def commands():
    for path in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.S):
            yield from (line for line in block.splitlines() if line.startswith("memdlm"))


@pytest.mark.parametrize("line", commands())
def test_a_documented_command_is_accepted(line):
    program, *words = shlex.split(line, comments=True)
    if program == "memdlm-eval":
        words = ["eval", "--model", "x", *words[words.index("--tasks") :]]
    assert words[0] in COMMANDS
    if words[0] == "eval":
        pytest.importorskip("lm_eval")
        parser = evaluation._parser()
        known, rest = parser.parse_known_args(words[1:])
        evaluation._check_rest(parser, evaluation._harness_cli(), rest)
        given = {key: value for key, value in vars(known).items() if key not in ("model", "tasks")}
        if "--extra_model_args" in rest:
            pairs = rest[rest.index("--extra_model_args") + 1].split(",")
            given |= dict(pair.split("=") for pair in pairs)
        parse_arguments({"pretrained": known.model, **given})
        for text in (rest[i + 1] for i, word in enumerate(rest) if word == "--metadata"):
            assert json.loads(text)["max_seq_lengths"]
    elif words[0] == "exposure-bias":
        memory = words.index("--mem_enabled")
        options, *_ = DataclassParser((BiasOptions,)).parse({}, words[1:])
        assert (options.steps, options.mem_enabled) == (48, words[memory + 1] == "True")
    elif words[0] == "memorize":
        options, _ = memorize_parser().parse({}, words[1:])
        assert options.output == words[words.index("--output") + 1]
    elif words[0] == "ask":
        options, _, given = ask_parser().parse({}, words[1:])
        assert options.keep_context == ("--keep_context" in words)
        assert all(question in words for question in given.question)


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`--(mem_\w+)", (ROOT / "docs/evaluation.md").read_text()))))
def test_a_documented_memory_option_exists(flag):
    assert f"--{flag}" in evaluation._parser().format_help()
