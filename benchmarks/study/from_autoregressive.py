"""An autoregressive model as the start of a masked diffusion model, against a start from nothing.

    python benchmarks/study/from_autoregressive.py
    python benchmarks/study/from_autoregressive.py --smoke      # everything once, tiny: no result

A small Qwen3-shaped decoder is trained with transformers to predict the next token of small English documents
(`small_english.py`), once. `memdlm convert` makes an A2D model of it. That model, and one of the same shape with random
weights, are then trained for equal steps on equal batches with the diffusion bound. Rows hold the bound per token on
documents of other names, at several numbers of steps. The seeds are those of the diffusion training and of the random
weights; the decoder is the same one. The steps of its own training are on top.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from small_english import page
from study_rows import Rows
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from memdlm.data.tokenizer import build_byte_pair_tokenizer
from memdlm.diffusion import Linear, corrupt, draw_times, masked_loss, normalise
from memdlm.models import ModelDenoiser, build_model, load_model, load_tokenizer
from memdlm.workflows.sessions.converting import ConvertOptions, convert

RESULTS = Path(__file__).parent / "results" / "from_autoregressive.json"
LENGTH, BATCH, LR = 48, 24, 2e-3


def windows(tokenizer: PreTrainedTokenizerBase, part: str, pages: int) -> Tensor:
    """Return [n, LENGTH] ids: documents of a part, one after the other, cut into pieces."""
    text = "\n".join(page(part, index, facts=3, filler=1).text for index in range(pages))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def rate(step: int, steps: int) -> float:
    """Return the learning rate: a short rise, then a fall to zero."""
    return LR * min(1.0, (step + 1) / 20) * (1 - step / steps)


def draw(data: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch."""
    return data[torch.randint(len(data), (BATCH,), generator=generator)]


def train_decoder(tokenizer: PreTrainedTokenizerBase, data: Tensor, *, steps: int) -> tuple[Qwen3ForCausalLM, float]:
    """Train the decoder; returns it and its last loss on next tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, generator, losses = Qwen3ForCausalLM(config), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        ids = draw(data, generator)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, sum(losses[-20:]) / len(losses[-20:])


def bound(model: PreTrainedModel, ids: Tensor, mask: int, generator: torch.Generator) -> Tensor:
    """Return the diffusion bound of a batch, per token."""
    everything = torch.ones_like(ids, dtype=torch.bool)
    times = draw_times((torch.rand(1, generator=generator) + torch.arange(len(ids)) / len(ids)) % 1, 1e-3)
    draws = torch.rand(ids.shape, generator=generator)
    noised = corrupt(ids, everything, times, draws, schedule=Linear(), mask_token_id=mask)
    lost = masked_loss(ModelDenoiser(model), ids, noised, everything, schedule=Linear())
    return normalise(lost.sums, lost.counts, "token").squeeze(0)


@torch.no_grad()
def measured(model: PreTrainedModel, data: Tensor, mask: int) -> float:
    """Return the bound on held-out documents, under masks that are the same every time."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    found = [float(bound(model, batch, mask, generator)) for batch in data.split(BATCH) for _ in range(2)]
    return sum(found) / len(found)


def train(
    model: PreTrainedModel, data: Tensor, held_out: Tensor, mask: int, *, steps: int, seed: int
) -> dict[str, Any]:
    """Train all weights; returns the held-out bound at 0, 1/4, 1/2 and all of the steps."""
    generator, found = torch.Generator().manual_seed(seed), {"0": measured(model, held_out, mask)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(steps):
        model.train()
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        bound(model, draw(data, generator), mask, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (steps // 4, steps // 2, steps):
            found[str(step + 1)] = measured(model, held_out, mask)
    return found


def main() -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of each diffusion training")
    parser.add_argument("--decoder_steps", type=int, default=500)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    steps, decoder_steps = (4, 4) if options.smoke else (options.steps, options.decoder_steps)
    with TemporaryDirectory() as work:
        rows = Rows(Path(work) / "smoke.json" if options.smoke else options.out)
        pages = [page("train", -1 - index, facts=3, filler=1).text for index in range(400)]
        tokenizer = build_byte_pair_tokenizer(pages, 512)
        data = windows(tokenizer, "train", 40 if options.smoke else 3000)
        held_out = windows(tokenizer, "test", 60)[:48]
        started = time.process_time()
        decoder, loss = train_decoder(tokenizer, data, steps=decoder_steps)
        decoder.save_pretrained(f"{work}/decoder")
        tokenizer.save_pretrained(f"{work}/decoder")
        convert(ConvertOptions(model=f"{work}/decoder", output=f"{work}/converted"))
        mask = int(load_tokenizer(f"{work}/converted").mask_token_id)
        shared = {"steps": steps, "decoder_steps": decoder_steps, "decoder_loss": loss}
        shared["decoder_seconds"] = round(time.process_time() - started)
        for seed in options.seeds[:1] if options.smoke else options.seeds:
            for arm in ("converted", "from nothing"):
                if rows.where(arm=arm, seed=seed, steps=steps, decoder_steps=decoder_steps):
                    continue
                model = load_model(f"{work}/converted")
                if arm == "from nothing":
                    model = build_model(model.config, seed=seed)
                began = time.process_time()
                found = train(model, data, held_out, mask, steps=steps, seed=seed)
                seconds = round(time.process_time() - began)
                print(rows.add({"arm": arm, "seed": seed, **shared, "bound": found, "cpu_seconds": seconds}))


if __name__ == "__main__":
    main()
