"""`memdlm eval --model NAME_OR_PATH --tasks ... [options]`, and `memdlm-eval`: lm-eval's own command line.

Both register our models and task files and end in lm-eval: what `memdlm eval` does not know itself goes there as it is.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

from memdlm.cli.parsing import Parser
from memdlm.errors import ConfigError, MemDLMError, did_you_mean
from memdlm.evaluation.harness_options import HarnessOptions, generation_fields, parse_arguments
from memdlm.inference.config import GenerationConfig
from memdlm.memory.config import MemoryConfig
from memdlm.options import as_flags

_NOT_FLAGS = ("pretrained", "adapter", "request_seed")
_EXTRA = "--extra_model_args"


def main(argv: Sequence[str]) -> int:
    """Translate our flags into lm-eval's and run it."""
    parser = _parser()
    known, rest = parser.parse_known_args(list(argv))
    given = {key: value for key, value in vars(known).items() if key not in ("model", "tasks")}
    arguments = {"pretrained": known.model, **given}
    cli = _harness_cli()
    _check_rest(parser, cli, rest)
    stock = ["run", "--model", "memdlm", "--model_args", json.dumps(arguments), "--tasks", *known.tasks, *rest]
    return _run(cli, stock)


def stock(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line (`memdlm-eval`); our mistakes are one line and status 2."""
    try:
        return _run(_harness_cli(), list(sys.argv[1:] if argv is None else argv))
    except MemDLMError as error:
        print(f"memdlm-eval: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(
        prog="memdlm eval",
        usage="memdlm eval --model NAME_OR_PATH --tasks TASK [TASK ...] [options] [any option of lm-eval]",
        description="Evaluate a model with lm-evaluation-harness, with or without memory.",
        epilog="All other options go to lm-eval: --metadata, --num_fewshot, --batch_size, --limit, --device, "
        "--apply_chat_template, --output_path, --log_samples, ... (memdlm-eval run --help lists them).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--model", required=True, metavar="NAME_OR_PATH", help="model or adapter: folder or hub name")
    parser.add_argument("--adapter", help="outer LoRA adapter on top of the model: folder or hub name")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help="names of tasks or groups")
    for title, config, prefix in (
        ("evaluation", HarnessOptions, ""),
        ("decoding", GenerationConfig, ""),
        ("memory", MemoryConfig, "mem_"),
    ):
        group = parser.add_argument_group(title)
        for name, _, field in as_flags(config, prefix):
            if name not in _NOT_FLAGS and (config is not GenerationConfig or name in generation_fields()):
                group.add_argument(f"--{name}", metavar="VALUE", help=_help(field))
    return parser


def _help(field: Any) -> str:
    default = "" if field.default in (None, (), dataclasses.MISSING) else f" (default {field.default})"
    return f"{field.metadata['help']}{default}"


def _harness_cli() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('evaluation needs lm-evaluation-harness; install it: pip install "memdlm[eval]".')
    # Importing it registers the model names.
    importlib.import_module("memdlm.evaluation.harness")
    return importlib.import_module("lm_eval._cli").HarnessCLI()


def _check_rest(parser: Parser, cli: Any, rest: Sequence[str]) -> None:
    """Refuse an option that neither we nor lm-eval know, naming the nearest of both."""
    theirs = [flag for action in cli._subparsers.choices["run"]._actions for flag in action.option_strings]
    ours = [flag for action in parser._actions for flag in action.option_strings]
    for each in rest:
        flag = each.split("=")[0]
        if flag.startswith("--") and flag not in (*theirs, _EXTRA):
            raise ConfigError(f"option {flag!r} is not known.{did_you_mean(flag, [*ours, *theirs, _EXTRA])}")


def _run(cli: Any, argv: list[str]) -> int:
    """Parse as lm-eval does, with our task files beside its own, and execute."""
    folder = importlib.import_module("memdlm.evaluation.harness").TASK_FOLDER
    importlib.import_module("lm_eval.utils").setup_logging()
    # --extra_model_args, the published scripts' flag, is one more --model_args: lm-eval merges them.
    earlier, sys.argv = sys.argv, ["memdlm-eval", *("--model_args" if each == _EXTRA else each for each in argv)]
    try:
        options = cli.parse_args()
    finally:
        sys.argv = earlier
    if "include_path" in vars(options):
        own = [options.include_path] if options.include_path else []
        options.include_path = [str(folder), *own]
    if getattr(options, "model", None) in ("memdlm", "llada", "llada21"):
        # Mistakes show before tasks are built, which takes minutes.
        parse_arguments({k: v for k, v in (options.model_args or {}).items() if k not in _LM_EVAL})
    cli.execute(options)
    return 0


_LM_EVAL = ("batch_size", "max_batch_size", "device", "trust_remote_code")
"""Arguments of a model that lm-eval sets itself."""
