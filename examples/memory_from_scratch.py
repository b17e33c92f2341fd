"""The whole method, masked diffusion with parametric memory, in one file. Read it from top to bottom.

This file does not import the package. `tests/test_example.py` checks that every number equals the library's.

    python examples/memory_from_scratch.py

B batch   L length   V vocabulary   D width   R rank of the fast weights   m the mask token
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 1. A denoiser: a small bidirectional transformer that predicts the masked tokens. ----------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, fast: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        inner = F.silu(self.up(self.norm2(x)))
        y = self.down(inner)
        if fast is not None:  # y = W x + (alpha / R) B A x
            a, b = fast
            y = y + 2.0 * inner @ a.T @ b.T
        return x + y


class Denoiser(nn.Module):
    def __init__(self, vocabulary: int, width: int = 32, heads: int = 2, depth: int = 2, length: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, fast: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """ids [B, L] -> logits [B, L, V]; `fast` sits in the last block's down projection."""
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.norm(self.blocks[-1](x, fast)))


# 2. Noise: at time t each maskable token becomes m with probability t; the loss is weighted by about 1 / t. ---------


def corrupt(clean: Tensor, is_maskable: Tensor, t: Tensor, u: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return (noised ids, is_masked), both [B, L]; `u` are U[0, 1) draws."""
    is_masked = is_maskable & (u < t[:, None])
    return clean.masked_fill(is_masked, m), is_masked


def nats(logits: Tensor, clean: Tensor, is_scored: Tensor) -> Tensor:
    """Return the cross-entropy to the true tokens where `is_scored`, 0 elsewhere: [B, L]."""
    return F.cross_entropy(logits.transpose(1, 2), clean, reduction="none") * is_scored


def outer_loss(logits: Tensor, clean: Tensor, is_masked: Tensor, is_maskable: Tensor, t: Tensor) -> Tensor:
    """Return the MDLM bound per maskable token."""
    return (nats(logits, clean, is_masked) / (t[:, None] + 1e-6)).sum() / is_maskable.sum()


# 3. The trajectory: from a noisier state down to the anchor, the very batch that the outer loss is computed on. -----


def trajectory(is_anchor: Tensor, is_maskable: Tensor, u: Tensor, steps: int = 2, scale: float = 1.5) -> list[Tensor]:
    """Return the masked sets of `steps` states, each [B, L]. They are nested, and the last one is the anchor."""
    states = []
    for row_anchor, row_maskable, row_u in zip(is_anchor, is_maskable, u, strict=True):
        anchor, extra = int(row_anchor.sum()), (row_maskable & ~row_anchor).nonzero().squeeze(1)
        extra = extra[row_u[extra].argsort()]  # in random order
        count = min(int(row_maskable.sum()), max(math.floor(scale * anchor), anchor)) - anchor
        row = []
        for left in range(steps - 1, -1, -1):
            is_masked = row_anchor.clone()
            is_masked[extra[:count]] = True
            row.append(is_masked)
            count -= math.ceil(count / left) if left else 0
        states.append(torch.stack(row))
    return list(torch.stack(states, dim=1))


# 4. The inner loop: one SGD step on the fast weights per state, each tensor's gradient clipped on its own. ----------


def write(
    model: Denoiser, clean: Tensor, states: list[Tensor], a: Tensor, m: int, lr: float = 0.1, clip: float = 1.0
) -> tuple[tuple[Tensor, Tensor], list[float]]:
    """Return the fast weights after the last state and the loss before each update. B starts at 0."""
    fast = [a.clone(), torch.zeros(model.blocks[-1].down.out_features, a.shape[0])]
    losses = []
    for is_masked in states:
        values = [value.detach().requires_grad_() for value in fast]
        logits = model(clean.masked_fill(is_masked, m), (values[0], values[1]))
        loss = nats(logits, clean, is_masked).sum() / is_masked.sum()
        gradients = torch.autograd.grad(loss, values)
        fast = [
            (value - lr * gradient * (clip / (gradient.norm() + 1e-12)).clamp(max=1)).detach()
            for value, gradient in zip(values, gradients, strict=True)
        ]
        losses.append(loss.item())
    return (fast[0], fast[1]), losses


# 5. Training: write the batch, then update the model with that memory attached, as a constant. ---------------------


def train(model: Denoiser, texts: Tensor, m: int, *, steps: int, rank: int = 4, seed: int = 0) -> list[float]:
    """Train on `texts` [N, L] and return the outer losses. The memory has seen the labels that the loss scores, so
    these losses are not comparable with those of a model without memory."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        clean = texts[torch.randint(len(texts), (8,), generator=g)]
        is_maskable = torch.ones_like(clean, dtype=torch.bool)
        t = 1e-3 + (1 - 1e-3) * torch.rand(len(clean), generator=g)
        noised, is_anchor = corrupt(clean, is_maskable, t, torch.rand(clean.shape, generator=g), m)
        states = trajectory(is_anchor, is_maskable, torch.rand(clean.shape, generator=g))
        fast = None
        if is_anchor.any():
            width = model.blocks[-1].down.in_features
            a = (torch.rand(rank, width, generator=g) * 2 - 1) / width**0.5
            fast, _ = write(model, clean, states, a, m)
        loss = outer_loss(model(noised, fast), clean, is_anchor, is_maskable, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# 6. Inference: write the prompt (some of its own tokens masked), then fill the response, surest token first. --------


@torch.no_grad()
def generate(model: Denoiser, prompt: Tensor, new: int, m: int, fast: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Decode `new` tokens after `prompt` [P], one per step."""
    ids = torch.cat((prompt, torch.full((new,), m)))[None]
    for _ in range(new):
        probability = model(ids, fast).softmax(-1)
        probability[..., m] = 0  # a mask is never a prediction
        confidence, token = probability.max(-1)
        surest = confidence.masked_fill(ids != m, -1).argmax()
        ids[0, surest] = token[0, surest]
    return ids[0]


def main() -> None:
    """Learn to count upwards modulo 15, with memory, and continue a prompt."""
    torch.manual_seed(0)
    m, texts = 15, (torch.arange(15)[:, None] + torch.arange(16)[None, :]) % 15
    model = Denoiser(vocabulary=16)
    losses = train(model, texts, m, steps=1200)
    print(f"outer loss with memory: {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f} nats per token")
    prompt, g = texts[4, :8], torch.Generator().manual_seed(1)
    everything = torch.ones(1, 8, dtype=torch.bool)
    is_anchor = everything & (torch.rand(1, 8, generator=g) < 0.2)
    is_anchor[0, 3] = True
    a = (torch.rand(4, model.blocks[-1].down.in_features, generator=g) * 2 - 1) / 8
    fast, written = write(model, prompt[None], trajectory(is_anchor, everything, torch.rand(1, 8, generator=g)), a, m)
    print("loss on the prompt while writing:", [round(loss, 3) for loss in written])
    print("prompt:", prompt.tolist(), "response:", generate(model, prompt, 8, m, fast)[8:].tolist())


if __name__ == "__main__":
    main()
