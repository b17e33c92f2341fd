"""Pre-trained masked language models of chemical reactions, fine-tuned as masked diffusion models.

    pip install --no-deps --target real rxnfp==0.1.0
    pip install --no-deps --target real rxnmapper==0.4.3
    python benchmarks/study/real_weights.py --packages real
    python benchmarks/study/real_weights.py --packages real --smoke      # everything once: no result

Each model is converted (`memdlm convert`), and trained for 200 steps on reactions of `reactions.py`. Its loss on hidden
tokens is measured before and after, at four shares of hidden tokens, on two sets that it was not trained on: reactions
written by hand with substituents of their own, and the reactions in rxnmapper's tests. Those of the tests may have been
among the patents that the models were pre-trained on. Pre-training hid 15 % of the tokens, diffusion hides any share.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from reactions import by_hand, published
from study_rows import Rows
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.diffusion import Linear, corrupt, draw_times, masked_loss, normalise
from memdlm.evaluation.masked_loss import MaskedText, masked_text
from memdlm.evaluation.masked_loss import masked_loss as text_loss
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import ModelDenoiser, load_model, load_tokenizer
from memdlm.randomness import derive
from memdlm.workflows.sessions.converting import ConvertOptions, convert

FOLDERS = {
    "rxnfp": "rxnfp/models/transformers/bert_pretrained",
    "rxnmapper": "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
}
"""Where the packages keep their models."""
RATIOS = (0.15, 0.3, 0.5, 0.8)
RESULTS = Path(__file__).parent / "results" / "real_weights.json"


def converted(packages: Path, name: str, output: Path) -> Path:
    """Convert the model of a package, once."""
    source = packages / FOLDERS[name]
    if not output.exists():
        convert(
            ConvertOptions(
                model=str(source), output=str(output), vocabulary=str(source / "vocab.txt"), pattern="smiles"
            )
        )
    return output


def texts_of(tokenizer: PreTrainedTokenizerBase, reactions: list[str], ratio: float) -> list[MaskedText]:
    """Hide `ratio` of the tokens of every reaction, in two views; [CLS] and [SEP] stay."""
    found = []
    for reaction in reactions:
        ids = torch.tensor(tokenizer(reaction).input_ids)
        inner = masked_text(ids[1:-1], ratio=ratio, views=2, generator=derive("real weights", reaction))
        border = torch.zeros(2, 1, dtype=torch.bool)
        found.append(MaskedText(ids=ids, is_masked=torch.cat([border, inner.is_masked, border], 1)))
    return found


def loss_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reactions: list[str]) -> dict[str, float]:
    """Return the loss in nats per hidden token, for each ratio."""
    model.eval()
    found = {}
    for ratio in RATIOS:
        texts = texts_of(tokenizer, reactions, ratio)
        sums = [text_loss(model, text, mask_token_id=tokenizer.mask_token_id) * text.num_scored for text in texts]
        found[str(ratio)] = sum(sums) / sum(text.num_scored for text in texts)
    return found


def batch_of(tokenizer: PreTrainedTokenizerBase, reactions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [B, L], what may be hidden, and the attention mask."""
    found = tokenizer(reactions, padding=True, return_tensors="pt", return_special_tokens_mask=True)
    return found.input_ids, found.special_tokens_mask == 0, found.attention_mask


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reactions: list[str], *, steps: int, seed: int
) -> list[float]:
    """Train all weights on the diffusion bound; returns the loss of every step."""
    generator, losses = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    model.eval()  # without dropout, as the other families are trained
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-4 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        chosen = torch.randint(len(reactions), (16,), generator=generator).tolist()
        ids, is_maskable, mask = batch_of(tokenizer, [reactions[index] for index in chosen])
        times = draw_times(torch.rand(len(ids), generator=generator), 1e-3)
        draws = torch.rand(ids.shape, generator=generator)
        noised = corrupt(ids, is_maskable, times, draws, schedule=Linear(), mask_token_id=tokenizer.mask_token_id)
        lost = masked_loss(ModelDenoiser(model, attention_mask=mask), ids, noised, is_maskable, schedule=Linear())
        loss = normalise(lost.sums, lost.counts, "token").squeeze(0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reactions: list[str]) -> dict[str, float]:
    """Write each reaction into a memory; return the mean loss on its hidden tokens without and with the memory."""
    memory = ParametricMemory(model.eval(), MemoryConfig(), mask_token_id=tokenizer.mask_token_id)
    found: dict[str, list[float]] = {"without": [], "with": []}
    for text in texts_of(tokenizer, reactions, 0.3):
        found["without"].append(text_loss(model, text, mask_token_id=tokenizer.mask_token_id))
        with memory.write(text.ids[None], generator=torch.Generator().manual_seed(0)):
            found["with"].append(text_loss(model, text, mask_token_id=tokenizer.mask_token_id))
    return {name: sum(values) / len(values) for name, values in found.items()}


def run(packages: Path, name: str, seed: int, steps: int, work: Path, most: int | None) -> dict[str, Any]:
    """Convert, measure, train, measure."""
    folder = converted(packages, name, work / name)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    training, held_out = by_hand()
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: most or 60].tolist()
    sets = {"by hand": [held_out[index] for index in order], "published": published(packages)[:most]}
    row: dict[str, Any] = {"model": name, "seed": seed, "steps": steps, "sizes": {k: len(v) for k, v in sets.items()}}
    row["before"] = {key: loss_on(model, tokenizer, reactions) for key, reactions in sets.items()}
    row["memory before"] = {key: written(model, tokenizer, reactions) for key, reactions in sets.items()}
    started = time.process_time()
    losses = train(model, tokenizer, training, steps=steps, seed=seed)
    row["train"] = {"first": sum(losses[:10]) / len(losses[:10]), "last": sum(losses[-10:]) / len(losses[-10:])}
    row["after"] = {key: loss_on(model, tokenizer, reactions) for key, reactions in sets.items()}
    row["memory after"] = {key: written(model, tokenizer, reactions) for key, reactions in sets.items()}
    return {**row, "cpu_seconds": round(time.process_time() - started)}


def main() -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder that pip --target wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with TemporaryDirectory() as work:
        rows = Rows(Path(work) / "smoke.json" if options.smoke else options.out)
        for name in options.models:
            for seed in options.seeds[:1] if options.smoke else options.seeds:
                steps = 2 if options.smoke else options.steps
                if not rows.where(model=name, seed=seed, steps=steps):
                    row = run(options.packages, name, seed, steps, Path(work), 2 if options.smoke else None)
                    print(rows.add(row))


if __name__ == "__main__":
    main()
