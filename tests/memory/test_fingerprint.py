"""Two models, tokenizers or texts that differ in one thing have fingerprints that say in which."""

import dataclasses

import pytest
import torch

from memdlm.errors import MemoryFileError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.files.fingerprint import Fingerprint, Identity, tensor_digest
from tiny import MASK, random_ids, tiny

KNOWN = Fingerprint(
    model="a",
    family="F",
    options={"width": 4},
    weights="0" * 64,
    mask_token_id=7,
    tokenizer="t",
    learned="l",
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"family": "G"}, "another family: F 'a', not G 'a'"),
        ({"options": {"width": 5}}, "with width=4; the model has 5"),
        ({"weights": "1" * 64}, "other base weights"),
        ({"tokenizer": "u"}, "another tokenizer"),
        ({"mask_token_id": 8}, "with mask_token_id 7, not 8"),
        ({"learned": "m"}, "another learned start"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_field_is_compared(changed, message):
    assert KNOWN.mismatch(KNOWN) is None
    assert message in KNOWN.mismatch(dataclasses.replace(KNOWN, **changed))


@pytest.mark.parametrize("unknown", [{"model": "b"}, {"tokenizer": None}, {"learned": None}, {"options": {}}], ids=str)
def test_what_only_one_of_them_knows_is_not_compared(unknown):
    other = dataclasses.replace(KNOWN, **unknown)
    assert KNOWN.mismatch(other) is None
    assert other.mismatch(KNOWN) is None


def test_a_memory_written_with_another_mask_token_is_refused(tmp_path):
    model, config = tiny("small"), MemoryConfig(inner_layer_fraction=0.5, inner_rank=2, inner_alpha=4.0)
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    with memory.write(random_ids(1, 6)):
        memory.save(tmp_path / "doc.mem")
    other = ParametricMemory(model, config, mask_token_id=MASK - 1)
    with pytest.raises(MemoryFileError, match=f"mask_token_id {MASK}, not {MASK - 1}"):
        other.load(tmp_path / "doc.mem")


PIECE = 1 << 15
"""So many values are summed at once on a CPU."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    ("one", "other"), [(0, PIECE), (5, 5 + 2 * PIECE), (PIECE - 1, PIECE), (1, 2), (0, 3 * PIECE - 1)]
)
def test_two_values_that_change_places_change_the_digest(dtype, one, other):
    values = torch.arange(3 * PIECE).remainder(251).to(dtype)
    values[one], values[other] = 3, 200
    swapped = values.clone()
    swapped[one], swapped[other] = 200, 3
    digests = {tensor_digest({"w": each}) for each in (values, swapped)}
    assert len(digests) == 2
    assert tensor_digest({"w": values.clone()}) in digests


def test_names_shapes_and_single_bits_count():
    value = torch.arange(6.0)
    changed = value.clone()
    changed[2] = torch.nextafter(changed[2], torch.tensor(9.0))
    seen = [{"w": value}, {"v": value}, {"w": value.view(2, 3)}, {"w": changed}, {"w": value, "v": value}]
    assert len({tensor_digest(each) for each in seen}) == len(seen)
    assert tensor_digest({"w": value.bfloat16()}) == tensor_digest({"w": value})


def test_weights_that_changed_in_place_are_read_again():
    model = tiny("small")
    identity = Identity(model, None, MASK)
    before = identity.fingerprint(None)
    assert identity.fingerprint(None) == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert identity.fingerprint(None).weights != before.weights
