"""`memdlm convert --model MODEL --output FOLDER`: make a masked diffusion model of another network."""

from collections.abc import Sequence

from memdlm.cli.output import say
from memdlm.cli.parsing import DataclassParser
from memdlm.workflows.sessions.converting import ConvertOptions, convert


def main(argv: Sequence[str]) -> int:
    """Write the folder, and say what is new in the model."""
    parser = DataclassParser(
        (ConvertOptions,),
        prog="memdlm convert",
        description="Make a masked diffusion model of a decoder (Qwen2, Qwen3, Llama), of a masked language model, or "
        "of an encoder.",
    )
    (options,) = parser.parse({}, argv)
    model, notes = convert(options)
    say(f"{options.output}: {type(model).__name__} from {options.model}")
    for note in notes:
        say(note)
    return 0
