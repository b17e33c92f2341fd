"""Generation and infilling commit the published tokens at every step; the likelihood equals the published one."""

import pytest
import torch
from torch.testing import assert_close

from goldens import ROOT, Case, cases, folders, model, read_json, tensors
from memdlm.diffusion import ClassifierFree, is_greedy, weighted_nll
from memdlm.inference import GenerationConfig, infill_job, response_job
from memdlm.models import ModelDenoiser, load_tokenizer

pytestmark = pytest.mark.golden
MASK, EOS = 505, 500


def numbered(family: str, prefix: str) -> list[torch.Tensor]:
    data = tensors(family, "sampler.safetensors")
    names = sorted((n for n in data if n.startswith(prefix + "/")), key=lambda n: int(n.rsplit("/", 1)[1]))
    return [data[name] for name in names]


def canvases(case: Case, **changes) -> list[torch.Tensor]:
    """Our canvases after every step, cut to what was asked for."""
    kind, record = case.name.split(":")[1].split("/")[0], case.record
    # The recordings go on after an end token, and so must we to be compared canvas by canvas.
    config = GenerationConfig(**{"eos_early_stop": False} | record["kwargs"] | changes)
    tokenizer = load_tokenizer(ROOT / case.family / "checkpoint")
    network = model(case.family)
    if kind == "sample":
        prompts = numbered(case.family, f"prompt/{record['prompts']}")
        job = response_job(network, tokenizer, prompts, config)
    else:
        rows = numbered(case.family, f"infill_in/{record['inputs']}")
        if not rows:  # "<set>one" is the first sequence of <set>
            rows = numbered(case.family, f"infill_in/{record['inputs'].removesuffix('one')}")[:1]
        job = infill_job(network, tokenizer, rows, config)
    return [step.ids[:, : int(job.canvas.response_ends.max())] for step in job.steps()]


SAMPLER = cases("sampler")
CACHES = ("exact", "none")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", [c for c in SAMPLER if "published_defect" not in c.record], ids=str)
def test_every_canvas_equals_the_published_one(case, cache):
    ours = canvases(case, cache=cache)
    name = case.name.split(":")[1]
    history = tensors(case.family, "sampler.safetensors")[f"{name}/histories"]
    assert len(ours) == case.record["n_forward"] == len(history) - 1
    for step, (mine, theirs) in enumerate(zip(ours, history[1:], strict=True)):
        assert mine.equal(theirs[:, : mine.shape[1]]), f"step {step}"


@pytest.mark.parametrize("case", [c for c in SAMPLER if "published_defect" in c.record], ids=str)
def test_where_the_published_sampler_leaves_masks_ours_does_not(case):
    name = case.name.split(":")[1]
    published = tensors(case.family, "sampler.safetensors")[f"{name}/sequences"]
    assert (published == MASK).any(), "the recorded defect: mask tokens in the output"
    if not case.record["kwargs"].get("eos_early_stop"):
        assert not (canvases(case)[-1] == MASK).any()
        return
    # Published: any end token in a block, even one of the prompt, ends the block's steps and leaves its masks, and
    # the next block is decoded after them. Right: what is decoded without stopping, up to the first end token.
    whole, stopped = canvases(case, eos_early_stop=False)[-1], canvases(case)[-1]
    starts = [row.numel() for row in numbered(case.family, f"prompt/{case.record['prompts']}")]
    for start, full, short, old in zip(starts, whole, stopped, published, strict=True):
        is_end = full[start:] == EOS
        known = start + int(is_end.int().argmax()) + 1 if is_end.any() else full.numel()
        assert short[:known].equal(full[:known])
        assert not (full == MASK).any()
        # Up to its first hole the published canvas holds nothing else.
        hole = int((old == MASK).int().argmax())
        assert hole >= start


@pytest.mark.parametrize("family", folders("nll.json"))
def test_likelihood_of_the_recorded_states(family):
    record, data = read_json(family, "nll.json"), tensors(family, "nll.safetensors")
    context, continuation = data["context"], data["continuation"]
    for name, run in record["runs"].items():
        values = []
        for index, expected in enumerate(run["per_iteration_loss"]):
            states, share = data[f"{name}/perturbed/{index}"], data[f"{name}/p_mask/{index}"]
            clean = torch.cat((context, continuation))[None].expand_as(states)
            denoise = ModelDenoiser(model(family))
            if run["kwargs"].get("cfg"):
                is_prompt = torch.zeros_like(states, dtype=torch.bool)
                is_prompt[:, : context.numel()] = True
                denoise = ClassifierFree(denoise, is_prompt, mask_token_id=MASK, scale=run["kwargs"]["cfg"])
            is_masked = states == MASK
            with torch.no_grad():
                nll = weighted_nll(denoise, clean, is_masked, share[:, -1], mask_token_id=MASK).mean().item()
            assert_close(nll, expected, rtol=1e-5, atol=1e-4)
            values.append(nll)
        assert_close(-sum(values) / len(values), run["loglikelihood"], rtol=1e-5, atol=1e-4)
    for name, expected in record.get("greedy_check", {}).items():
        with torch.no_grad():
            greedy = is_greedy(ModelDenoiser(model(family)), context, data[name], mask_token_id=MASK)
        assert greedy == expected
