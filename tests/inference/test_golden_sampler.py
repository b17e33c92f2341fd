"""Generation and infilling commit the published tokens at every step; the likelihood equals the published one."""

import pytest
import torch
from torch.testing import assert_close

from goldens import ROOT, Case, cases, folders, model, read_json, tensors
from memdlm.diffusion import ClassifierFree, is_greedy, weighted_nll
from memdlm.inference import GenerationConfig, stream
from memdlm.inference.generate import _decode, _denoiser, _infill_canvas, special_ids
from memdlm.models import ModelDenoiser, load_tokenizer

pytestmark = pytest.mark.golden
MASK = 505


def numbered(family: str, prefix: str) -> list[torch.Tensor]:
    data = tensors(family, "sampler.safetensors")
    names = sorted((n for n in data if n.startswith(prefix + "/")), key=lambda n: int(n.rsplit("/", 1)[1]))
    return [data[name] for name in names]


def canvases(case: Case) -> list[torch.Tensor]:
    """Our canvases after every step, the starting one first."""
    kind, record = case.name.split(":")[1].split("/")[0], case.record
    options = dict(record["kwargs"])
    config = GenerationConfig(**options)
    tokenizer = load_tokenizer(ROOT / case.family / "checkpoint")
    network = model(case.family)
    if kind == "sample":
        prompts = numbered(case.family, f"prompt/{record['prompts']}")
        return [step.ids for step in stream(network, tokenizer, prompts, config)]
    rows = numbered(case.family, f"infill_in/{record['inputs']}")
    if not rows:  # "<set>one" is the first sequence of <set>
        rows = numbered(case.family, f"infill_in/{record['inputs'].removesuffix('one')}")[:1]
    special = special_ids(tokenizer)
    canvas = _infill_canvas(rows, config, special, torch.device("cpu"))
    denoise = _denoiser(network, canvas, config)
    return [step.ids for step in _decode(denoise, canvas, config, special, rows, None, None)]


SAMPLER = cases("sampler")


@pytest.mark.parametrize("case", [c for c in SAMPLER if "published_defect" not in c.record], ids=str)
def test_every_canvas_equals_the_published_one(case):
    ours = canvases(case)
    name = case.name.split(":")[1]
    history = tensors(case.family, "sampler.safetensors")[f"{name}/histories"]
    assert len(ours) == case.record["n_forward"] == len(history) - 1
    for step, (mine, theirs) in enumerate(zip(ours, history[1:], strict=True)):
        assert mine.equal(theirs), f"step {step}"


@pytest.mark.parametrize("case", [c for c in SAMPLER if "published_defect" in c.record], ids=str)
def test_where_the_published_sampler_leaves_masks_ours_does_not(case):
    name = case.name.split(":")[1]
    published = tensors(case.family, "sampler.safetensors")[f"{name}/sequences"]
    assert (published == MASK).any(), "the recorded defect: mask tokens in the output"
    assert not (canvases(case)[-1] == MASK).any()


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
