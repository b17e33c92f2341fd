"""`memdlm merge --adapter ADAPTER --output FOLDER`: fold an outer adapter, or a memory, into its base, as one model."""

from collections.abc import Sequence

from memdlm.cli.output import say
from memdlm.cli.parsing import Parser
from memdlm.models.hub.devices import AUTO, DEVICE_HELP
from memdlm.models.lora.files import base_of_adapter
from memdlm.outputs import output_folder
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.merging import MODEL, merge


def main(argv: Sequence[str]) -> int:
    """Write the merged model, in the published layout, with its tokenizer beside it."""
    parser = Parser(prog="memdlm merge", description="Fold an outer LoRA, or a memory, into its base model.")
    parser.add_argument("--adapter", required=True, help="folder or hub name of the adapter, or folder of a memory")
    parser.add_argument("--output", required=True, help="folder to write; it must be new or empty")
    parser.add_argument(
        "--base", default=None, help="folder or hub name of the base model; default: the one that the adapter names"
    )
    parser.add_argument("--dtype", default="bfloat16", help="number type of the merged weights; auto keeps the base's")
    parser.add_argument("--device", default=AUTO, help=DEVICE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    options = parser.parse_args(list(argv))
    base = base_of_adapter(options.adapter) if options.base is None else options.base
    with output_folder(options.output, MODEL, overwrite=options.overwrite) as output:
        merge(base, options.adapter, output, dtype=options.dtype, device=options.device, display=Display())
    say(f"{options.output}: {base} with {options.adapter} merged in, {options.dtype}")
    return 0
