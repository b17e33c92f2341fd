"""`memdlm eval --model NAME_OR_PATH --tasks ... [options]`, and `memdlm-eval`: lm-eval's own command line.

Both register our models and task files, then run lm-eval. `memdlm eval` passes on unchanged what it does not know.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

from memdlm.cli.border import guarded
from memdlm.cli.names import instead
from memdlm.cli.parsing import Parser
from memdlm.errors import ConfigError, did_you_mean
from memdlm.evaluation.harness_options import HarnessOptions, generation_fields
from memdlm.inference.config import GenerationConfig
from memdlm.memory.config import MemoryConfig
from memdlm.models.hub.devices import AUTO, DEVICE_HELP
from memdlm.options import as_flags

_NOT_FLAGS = ("pretrained", "adapter", "request_seed")
_PASSED_ON = ("model", "tasks", "device")
"""Our flags that lm-eval has, too."""
_EXTRA = "--extra_model_args"


def main(argv: Sequence[str]) -> int:
    """Translate our flags into lm-eval's and run it."""
    parser = _parser()
    known, rest = parser.parse_known_args(list(argv))
    given = {key: value for key, value in vars(known).items() if key not in _PASSED_ON}
    arguments = {"pretrained": known.model, **given}
    harness = _harness()
    _check_rest(parser, harness.flags(), rest)
    tasks = ["--tasks", *known.tasks, *(["--device", known.device] if "device" in known else [])]
    harness.run(_translated(["run", "--model", "memdlm", "--model_args", json.dumps(arguments), *tasks, *rest]))
    return 0


def stock(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval's command line (`memdlm-eval`), with errors reported as by `memdlm`."""
    return guarded("memdlm-eval", list(sys.argv[1:] if argv is None else argv), _stock)


def _stock(argv: list[str]) -> int:
    _harness().run(_translated(argv))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="memdlm eval",
        usage="memdlm eval --model NAME_OR_PATH --tasks TASK [TASK ...] [options] [any option of lm-eval]",
        description="Evaluate a model with lm-evaluation-harness, with or without memory.",
        epilog="All other options go to lm-eval: --metadata, --num_fewshot, --batch_size, --limit, "
        "--apply_chat_template, --output_path, --log_samples, ... (memdlm-eval run --help lists them).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="folder or hub name of the model or adapter"
    )
    parser.add_argument("--adapter", help="folder or hub name of an outer LoRA adapter on top of the model")
    parser.add_argument("--device", help=f"{DEVICE_HELP} (default {AUTO})")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help="names of lm-eval tasks or groups")
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


def _harness() -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('evaluation needs lm-evaluation-harness; install it: pip install "memdlm[eval]".')
    # The import registers the model names.
    return importlib.import_module("memdlm.evaluation.harness_run")


def _translated(argv: Sequence[str]) -> list[str]:
    """Turn --extra_model_args, a flag of the published scripts, into another --model_args; lm-eval merges them."""
    return ["--model_args" if each == _EXTRA else each for each in argv]


def _check_rest(parser: Parser, theirs: Sequence[str], rest: Sequence[str]) -> None:
    """Refuse an option that neither memdlm nor lm-eval knows, and name the nearest of both."""
    ours = [flag for action in parser._actions for flag in action.option_strings]
    for each in rest:
        flag = each.split("=")[0]
        if flag.startswith("--") and flag not in (*theirs, _EXTRA):
            hint = instead(flag) or did_you_mean(flag, [*ours, *theirs, _EXTRA])
            raise ConfigError(f"option {flag!r} is not known.{hint}")
