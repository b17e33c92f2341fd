"""Run lm-eval's command line: check its options before tasks are built, and give its errors as one line."""

import argparse
import difflib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.caching.cache as request_cache
import lm_eval.evaluator as evaluator
from datasets.exceptions import DatasetsError
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging

from memdlm.errors import ConfigError, MachineError, MemDLMError, did_you_mean
from memdlm.evaluation.harness import TASK_FOLDER, check_batch_size
from memdlm.evaluation.harness_options import parse_arguments
from memdlm.evaluation.identity import requests_identity, settings_identity
from memdlm.evaluation.longctx import parse_lengths
from memdlm.files import cache_folder
from memdlm.memory.files.library import find_memory
from memdlm.models.hub.devices import AUTO, check_device
from memdlm.models.lora.files import is_adapter, with_tokenizer

OURS = ("memdlm", "llada", "llada21")
"""Names under which our model class is registered."""
_LM_EVAL = ("batch_size", "max_batch_size", "device", "trust_remote_code")
"""Model arguments that lm-eval sets itself."""
_MOST_DOCUMENTS, _MOST_SHOTS = 10**9, 10**4
log = logging.getLogger(__name__)


def flags() -> list[str]:
    """Return the options of lm-eval's own command `run`."""
    actions = HarnessCLI()._subparsers.choices["run"]._actions
    return [flag for action in actions for flag in action.option_strings]


def run(argv: Sequence[str]) -> None:
    """Parse as lm-eval does, with our task files beside its own, and evaluate.

    Raises ConfigError for invalid options, tasks and metadata, MachineError for data that is not available.
    """
    setup_logging()
    cli = HarnessCLI()
    options = _parsed(cli, argv)
    if "include_path" in vars(options):
        own = [options.include_path] if options.include_path else []
        options.include_path = [str(TASK_FOLDER), *own]
    if getattr(options, "command", None) == "run":
        prepare(options)
    try:
        with _without_git():
            cli.execute(options)
    except MemDLMError:
        raise
    except Exception as error:
        told = explained(error, options)
        if told is None:
            raise
        raise told from error


@contextmanager
def _without_git() -> Iterator[None]:
    """Outside a checkout, let lm-eval not ask git for the commit: git would print an error that means nothing."""
    here, known = Path.cwd(), evaluator.get_git_commit_hash
    if not any((folder / ".git").exists() for folder in (here, *here.parents)):
        evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = known


def _parsed(cli: HarnessCLI, argv: Sequence[str]) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise ConfigError(f"{message}. memdlm-eval run --help lists the options.")

    for parser in (cli._parser, *cli._subparsers.choices.values()):
        parser.error = refuse
    _refuse_repeated(cli._subparsers.choices["run"], argv)
    earlier, sys.argv = sys.argv, ["memdlm-eval", *argv]
    try:
        return cli.parse_args()
    except (ValueError, TypeError, SyntaxError, AttributeError) as error:
        raise ConfigError(f"an option of lm-eval cannot be read: {error}") from error
    finally:
        sys.argv = earlier


def _refuse_repeated(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Raise ConfigError for an option with one value that is given twice: only the last would count."""
    single = {flag: each.dest for each in parser._actions if each.nargs is None for flag in each.option_strings}
    seen: set[str] = set()
    for word in argv:
        name = single.get(word.split("=")[0])
        if name in seen:
            raise ConfigError(f"--{name} is given twice, only one would count. Leave one out.")
        if name is not None:
            seen.add(name)


def prepare(options: argparse.Namespace) -> None:
    """Check the options before tasks are built, which takes minutes; give every set of settings its own caches."""
    _check_sizes(options)
    try:
        config = EvaluatorConfig.from_cli(options)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"options of lm-eval: {error}") from error
    if config.model not in OURS:
        return
    arguments = {key: value for key, value in dict(config.model_args).items() if key not in _LM_EVAL}
    settings = parse_arguments(arguments)
    if settings.options.memory is not None:
        find_memory(settings.options.memory)
    check_batch_size(config.batch_size, config.max_batch_size)
    _settle_device(options)
    options.metadata = _metadata(dict(options.metadata or {}), settings.options.tokenizer, settings.options.pretrained)
    _fit_lengths(options.metadata, _task_names(options))
    if options.use_cache is not None:
        options.use_cache = f"{options.use_cache}-{settings_identity(settings)}"
        log.info("answers of these settings are kept in %s", options.use_cache)
    if options.cache_requests:
        request_cache.PATH = str(cache_folder() / "requests" / requests_identity(vars(options), settings))


def _settle_device(options: argparse.Namespace) -> None:
    """Put "auto" where no device is named; lm-eval would name the first CUDA card."""
    file = getattr(options, "config", None)
    if options.device is None:
        options.device = str((EvaluatorConfig.load_yaml_config(file) if file else {}).get("device") or AUTO)
    if options.device != AUTO:
        check_device(options.device)


def _check_sizes(options: argparse.Namespace) -> None:
    limit, shots = options.limit, options.num_fewshot
    if limit is not None and not (0 < limit <= _MOST_DOCUMENTS and (limit < 1 or limit == math.floor(limit))):
        raise ConfigError(
            f"limit: {limit} is no number of documents; it must be a share below 1, or a whole number up to "
            f"{_MOST_DOCUMENTS}."
        )
    if shots is not None and not 0 <= shots <= _MOST_SHOTS:
        raise ConfigError(f"num_fewshot: {shots} is not possible; it must be from 0 to {_MOST_SHOTS}.")


def _task_names(options: argparse.Namespace) -> list[str]:
    given = options.tasks or []
    return [name for each in ([given] if isinstance(given, str) else given) for name in str(each).split(",")]


def _metadata(given: dict[str, Any], tokenizer: str | None, pretrained: str) -> dict[str, Any]:
    """Add the tokenizer that the model is loaded with, where it is not in the model's own folder."""
    if "tokenizer" in given or tokenizer is not None or not is_adapter(pretrained):
        return given
    return {**given, "tokenizer": with_tokenizer(pretrained)}


_READ = ("max_seq_lengths", "num_samples", "data_seed", "task_options")
"""What tasks read."""


def _fit_lengths(metadata: dict[str, Any], tasks: Sequence[str]) -> None:
    """Write `max_seq_lengths` as the tasks read it: BABILong as one dataset name (2k), all others as numbers.

    Raises ConfigError for lengths that are none, and for another spelling of a name, which no task would read.
    """
    for name in metadata:
        # So close that no task's own name, such as max_length, is meant by it.
        meant = difflib.get_close_matches(name, _READ, n=1, cutoff=0.84)
        if meant and name not in _READ:
            raise ConfigError(f"metadata: no task reads {name!r}. Did you mean {meant[0]!r}?")
    if "max_seq_lengths" not in metadata:
        return
    lengths = parse_lengths(metadata["max_seq_lengths"], zero=True)
    babilong = [name for name in tasks if name.startswith("babilong")]
    if not babilong:
        metadata["max_seq_lengths"] = parse_lengths(metadata["max_seq_lengths"])
        return
    if len(lengths) != 1 or lengths[0] % 1024:
        raise ConfigError(
            f"max_seq_lengths={metadata['max_seq_lengths']!r}: BABILong is evaluated at one length at a time, such as "
            '"2k".'
        )
    if len(babilong) < len(tasks):
        raise ConfigError(f"tasks: BABILong writes lengths in its own way; evaluate {babilong[0]!r} by itself.")
    thousands = lengths[0] // 1024
    metadata["max_seq_lengths"] = "1M" if thousands == 1024 else f"{thousands}k"


def explained(error: Exception, options: argparse.Namespace) -> MemDLMError | None:
    """Return what an exception of lm-eval means to the user; None if the user's input did not cause it."""
    tasks = ", ".join(map(repr, _task_names(options)))
    missing = str(error).partition("Tasks not found: ")[2]
    if missing:
        known = TaskManager(include_path=getattr(options, "include_path", None)).all_tasks
        named = [f"{name!r} is not known.{did_you_mean(name, known)}" for name in missing.split(", ")]
        return ConfigError(f"tasks: {' '.join(named)} memdlm-eval ls tasks lists all.")
    if not _is_foreign(error):
        return None
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (OSError, DatasetsError)) and getattr(error, "errno", None) is None:
        return MachineError(
            f"tasks {tasks}: their data comes from the network and could not be loaded ({said}). Run once where the "
            "hub can be reached, so that it is cached; after that HF_HUB_OFFLINE=1 works. The group memdlm_longctx "
            "needs no network."
        )
    if isinstance(error, LookupError) and "nltk" in said:
        return MachineError(f"tasks {tasks}: they need data of nltk, which is not installed ({said}).")
    if isinstance(error, ImportError):
        return MachineError(f"tasks {tasks}: they need a package that is not installed: {error}.")
    if isinstance(error, OSError):
        return None
    return ConfigError(f"lm-eval failed on the tasks {tasks} ({said}). Check --tasks and --metadata.")


def _is_foreign(error: BaseException) -> bool:
    """Whether an exception comes from lm-eval or its libraries, and not from our code that lm-eval called."""
    here, trace, is_foreign = Path(__file__), error.__traceback__, False
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if here.parents[1] in file.parents:
            is_foreign = file == here
        trace = trace.tb_next
    return is_foreign
