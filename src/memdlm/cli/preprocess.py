"""`memdlm preprocess --model ... --dataset_args ... --output_dir ...`: tokenize a dataset once."""

from collections.abc import Sequence

from memdlm.cli.output import say
from memdlm.cli.parsing import DataclassParser
from memdlm.workflows.display import Display
from memdlm.workflows.runs.preprocess import PreprocessOptions, run_preprocessing


def main(argv: Sequence[str]) -> int:
    """Write the folder, and print what is in it."""
    parser = DataclassParser(
        (PreprocessOptions,), prog="memdlm preprocess", description="Tokenize a dataset once, for many training runs."
    )
    (options,) = parser.parse({}, argv)
    manifest = run_preprocessing(options, Display())
    for split, facts in manifest["splits"].items():
        bare = f", {facts['without_context']} without a context" if facts.get("without_context") else ""
        say(
            f"{split}: {facts['rows']} conversations, {facts['tokens']} tokens, the longest {facts['longest']}; "
            f"{facts['without_target']} with nothing to learn{bare}"
        )
    say(options.output_dir)
    return 0
