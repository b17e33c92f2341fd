"""Dream, SDAR and BD3LM commit the published tokens at every step; where the published samplers err, ours do not."""

import pytest
import torch

from goldens import cannot_replay, folders, read_json, tensors
from memdlm.diffusion import dream_counts, positions_of
from published import MASK, Recording, decoded, difference, recordings, sampler_of

pytestmark = pytest.mark.golden
ALL = [*recordings("sampler"), *recordings("bd3lm")]
RIGHT = [case for case in ALL if not case.is_defect and not case.is_drawn]
CACHES = ("exact", "none")
# In Dream every position sees every other, and there is nothing to cache.
CACHED = [(case, cache) for case in RIGHT for cache in CACHES if cache == "exact" or sampler_of(case.family) != "dream"]


@pytest.mark.parametrize(("case", "cache"), CACHED, ids=str)
def test_every_canvas_equals_the_published_one(case, cache):
    job, ours = decoded(case, cache)
    states = case.canvases(job)
    found = difference(job, ours, states)
    if found is not None and found.startswith("tie"):
        pytest.xfail(found)
    assert found is None, found
    # Steps that commit nothing, and passes that only store keys and values, are not steps of ours.
    if not case.stops:
        assert len(ours) == len(states) - 1
        assert int(sum((row == MASK).sum() for row in states[-1])) == case.record.get("masks_left", 0)
    assert not (ours[-1][job.canvas.is_there] == MASK).any()


@pytest.mark.parametrize("case", [case for case in RIGHT if case.stops], ids=str)
def test_a_response_ends_with_the_published_stop_token(case):
    """Published: after the block that holds one. Ours may stop inside that block, with the same text up to it."""
    job = case.job(eos_early_stop=True)
    result, (whole, canvases) = job.run(), decoded(case)
    last = case.canvases(whole)[-1]
    for row, published, start in zip(result.sequences, last, whole.canvas.prompt_lengths.tolist(), strict=True):
        assert row[start:].tolist()[-1] in job.decoder.stops
        assert not torch.isin(row[start:-1], torch.tensor(job.decoder.stops)).any()
        assert row.equal(published[: len(row)])
    assert result.unresolved == 0
    assert result.num_forward_passes < whole.meter.passes
    assert len(canvases) > len(case.canvases(whole)) - 1


@pytest.mark.parametrize("case", [case for case in ALL if case.is_drawn], ids=str)
def test_drawn_positions_get_the_published_tokens(case):
    """Dream's `origin` draws the positions; these are read off the history, and each step's tokens are computed."""
    job = case.job()
    states, canvas = case.canvases(job), job.canvas.ids
    assert torch.cat(states[0]).tolist() == canvas[job.canvas.is_there].tolist()
    for rows in states[1:]:
        after = canvas.clone()
        after[job.canvas.is_there] = torch.cat(rows)
        is_new = after != canvas
        assert (canvas[is_new] == MASK).all()
        with torch.no_grad():
            logits = job._denoiser().logits(canvas, positions_of(is_new))
        # The greedy token does not depend on the order that this sampler would draw.
        sampler = job.decoder.sampler
        assert after[is_new].equal(sampler.choose(logits, torch.Generator())[0])
        canvas = after
    assert int((canvas == MASK).sum()) == case.record["masks_left"]
    assert case.job().run().unresolved == 0


def defects(test):
    """The recorded defects that `test` is about; whether all are about something is tested below."""
    return pytest.mark.parametrize("case", [case for case in ALL if case.is_defect and test(case)], ids=str)


def is_mean_count(case: Recording) -> bool:
    """Dream: counts from the mean over the batch."""
    return case.kind == "gen"


def is_certain(case: Recording) -> bool:
    """SDAR: confidences among the tokens that top_k left."""
    return sampler_of(case.family) == "sdar" and bool(case.record["kwargs"].get("top_k"))


def is_overwritten(case: Recording) -> bool:
    """SDAR: more positions than are open."""
    return sampler_of(case.family) == "sdar" and not is_certain(case)


def is_pad_by_id(case: Recording) -> bool:
    """BD3LM: a generated token that equals the padding."""
    return "pad" in case.record.get("token_ids", {})


def test_every_recorded_defect_is_one_of_those_below():
    for case in ALL:
        kinds = [test(case) for test in (is_mean_count, is_certain, is_overwritten, is_pad_by_id)]
        if case.is_defect and sum(kinds) != 1:
            cannot_replay(case, "no test knows the right value")


@defects(is_mean_count)
def test_every_row_commits_its_own_masks(case):
    """Published: each step commits as many as the MEAN row should. A row with fewer masks gets committed tokens masked
    again, a row with more keeps masks at the end. Right: what each row gets alone, where the mean is its own number.
    """
    published = tensors(case.family, f"{case.file}.safetensors")[f"{case.name}/sequences"]
    assert (published == MASK).any(), "the recorded defect: mask tokens in the output"
    new = case.record["kwargs"]["max_new_tokens"]
    rows = [torch.cat((row, torch.full((new,), MASK))) for row in case.rows()]
    job = case.job(infills=True, rows=rows)
    steps = list(job.steps())
    final, given = steps[-1].ids, job.canvas.ids
    assert final[given != MASK].equal(given[given != MASK])
    assert not (final == MASK).any()
    masks = torch.tensor([int((row == MASK).sum()) for row in rows])
    assert len(masks.unique()) > 1
    options = job.decoder.options
    expected = dream_counts(masks, options.steps, eps=options.eps)
    for index, counts in enumerate(expected.tolist()):
        made = [int(step.is_new[index].sum()) for step in steps]
        assert [n for n in made if n] == [n for n in counts if n]
        alone = case.job(infills=True, rows=[rows[index]]).run()
        assert alone.sequences[0].equal(final[index, : len(rows[index])])


@defects(is_overwritten)
def test_the_prompt_is_never_overwritten(case):
    """Published: a step takes its share of the whole block, also from what is given. Right: at most what is open."""
    job, ours = decoded(case)
    for cache in CACHES:
        assert decoded(case, cache)[1][-1].equal(ours[-1])
    states = case.canvases(job)
    prompt = int(job.canvas.prompt_lengths[0])
    wrong = next(index for index, (row,) in enumerate(states) if not row[:prompt].equal(case.rows()[0]))
    # From the same canvas the same tokens are committed, but for the prompt.
    for mine, (theirs,) in zip(ours[:wrong], states[1 : wrong + 1], strict=True):
        assert mine[0, prompt : len(theirs)].equal(theirs[prompt:])
    assert ours[-1][0, :prompt].equal(case.rows()[0])
    assert not (ours[-1] == MASK).any()


@defects(is_certain)
def test_one_candidate_is_greedy_decoding(case):
    """Published: with top_k=1 every confidence is 1, and whole blocks are committed whatever the threshold. Right: the
    confidences are those of greedy decoding, which has the same tokens to choose from.
    """
    job, ours = decoded(case)
    _, greedy = decoded(case, "none", top_k=None, temperature=0.0)
    assert [each.tolist() for each in ours] == [each.tolist() for each in greedy]
    assert len(ours) > len(case.canvases(job)) - 1, "the recorded defect: too few steps"


@defects(is_pad_by_id)
def test_a_generated_padding_token_is_a_token(case):
    """Published: a generated token with the id of the padding drops out of attention and positions of later blocks.
    Right: nothing is padding that the caller did not leave out; so all agrees until such a block is finished.
    """
    job, ours = decoded(case)
    pad, block = case.record["token_ids"]["pad"], job.canvas.block_size
    states = case.canvases(job)
    is_pad = [row[start:] == pad for row, start in zip(states[-1], starts(job), strict=True)]
    first = min(int(each.int().argmax()) for each in is_pad if each.any())
    later = (first // block + 1) * block  # where the next block begins, counted from the response
    behind = [[row[start + later :] for row, start in zip(each, starts(job), strict=True)] for each in states]
    agreed = sum(bool((torch.cat(rows) == MASK).all()) for rows in behind)
    assert difference(job, ours[: agreed - 1], states) is None
    assert difference(job, ours, states) is not None
    assert not (ours[-1] == MASK).any()
    assert decoded(case, "none")[1][-1].equal(ours[-1])


def starts(job):
    return job.canvas.prompt_lengths.tolist()


ERRORS = {
    "temperature_0": {"temperature": 0.0},
    "entropy_bounded": {"remasking": "entropy_bounded", "steps_per_block": None, "threshold": None},
    "sequential_tail_fewer_steps": {"remasking": "sequential", "steps_per_block": 2, "threshold": None},
}


@pytest.mark.parametrize("family", folders("errors.json"))
def test_what_fails_in_the_published_sampler_works(family):
    for name in read_json(family, "errors.json"):
        if name not in ERRORS:
            cannot_replay(family, f"no test knows the published error {name!r}")
        # One case for every length of prompt.
        cases = {len(case.rows()[0]): case for case in RIGHT if case.family == family and case.file == "sampler"}
        for length, case in cases.items():
            result = case.job(**ERRORS[name]).run()
            assert result.unresolved == 0
            assert result.sequences[0][:length].equal(case.rows()[0])
