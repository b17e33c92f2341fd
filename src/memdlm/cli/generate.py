"""`memdlm generate --model MODEL "prompt"`: load, decode, print."""

from collections.abc import Sequence

from memdlm.cli.parsing import Parser
from memdlm.inference import GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import load_model, load_tokenizer
from memdlm.randomness import derive


def main(argv: Sequence[str]) -> int:
    """Print one response per prompt."""
    parser = Parser(prog="memdlm generate", description="Decode a response to each prompt.")
    parser.add_argument("prompts", nargs="+", help="texts; with --chat each is one user message")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    parser.add_argument("--device", default=None, help="for example cuda; default: the CPU")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="length of the response")
    parser.add_argument("--block_size", type=int, default=None, help="tokens decoded together; default: all")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; default: one per token")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--mem_enabled", action="store_true", help="write each prompt into memory first")
    parser.add_argument("--seed", type=int, default=0, help="of memories and samples")
    options = parser.parse_args(list(argv))
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        block_size=options.block_size,
        steps=options.steps,
        temperature=options.temperature,
    )
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    tokenizer = load_tokenizer(options.model)
    memory = None
    if options.mem_enabled:
        memory = ParametricMemory(model, MemoryConfig(), mask_token_id=tokenizer.mask_token_id)
    prompts = [[{"role": "user", "content": text}] if options.chat else text for text in options.prompts]
    result = generate(
        model, tokenizer, prompts, config, memory=memory, generator=derive("memdlm generate", options.seed)
    )
    for text in result.texts:
        print(text)
    return 0
