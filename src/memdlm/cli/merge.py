"""`memdlm merge --adapter ADAPTER --output FOLDER`: fold an outer adapter into its base, as one ordinary model."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from memdlm.cli.output import say
from memdlm.cli.parsing import Parser
from memdlm.errors import ConfigError
from memdlm.models import load_model, load_tokenizer, merge_outer_adapter
from memdlm.models.adapter_files import base_of_adapter, with_tokenizer
from memdlm.models.loading import cast_parameters


def main(argv: Sequence[str]) -> int:
    """Write the merged model, in the published layout, with its tokenizer beside it."""
    parser = Parser(prog="memdlm merge", description="Fold an outer LoRA into its base model.")
    parser.add_argument("--adapter", required=True, help="folder or hub name of the adapter")
    parser.add_argument("--output", required=True, help="folder to write; it must be new or empty")
    parser.add_argument("--base", default=None, help="folder or hub name; default: the one the adapter names")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights written; auto keeps the base's")
    parser.add_argument("--device", default=None, help="where to add up, for example cuda; default: the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    options = parser.parse_args(list(argv))
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {options.output!r} is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise ConfigError(f"output: {options.output!r} is not empty; name a new folder, or add --overwrite.")
    base = base_of_adapter(options.adapter) if options.base is None else options.base
    # Summed in the base's own precision, then rounded once to the one that was asked for.
    model = load_model(base, device=options.device, adapter=options.adapter)
    merge_outer_adapter(model)
    cast_parameters(model, options.dtype)
    tokenizer = load_tokenizer(with_tokenizer(options.adapter, base))
    temporary = output.absolute().parent / f".{output.name}.{os.getpid()}"
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{options.output}: {base} with {options.adapter} merged in, {options.dtype}")
    return 0
