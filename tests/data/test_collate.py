"""Padding: how much of it is seen and learned, and that it is told apart from an EOS of the row's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdlm.data import Collator
from memdlm.data.collate import SUPERVISE_PADDING
from memdlm.errors import DataError
from memdlm.types import IGNORE_INDEX

PAD = 7


def rows_of(lengths):
    return [{"input_ids": [PAD] * n, "labels": [IGNORE_INDEX] * (n - 1) + [PAD]} for n in lengths]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    mode=st.sampled_from(SUPERVISE_PADDING),
    multiple=st.sampled_from([None, 4]),
)
def test_padding_is_marked_whatever_the_tokens_are(lengths, mode, multiple):
    batch = Collator(PAD, mode, pad_to_multiple_of=multiple, block_size=3)(rows_of(lengths))
    width = batch["input_ids"].shape[1]
    assert width >= max(lengths) + (mode == "first")
    assert multiple is None or width % multiple == 0
    # Every token of the rows is PAD here: only lengths can tell what was added.
    assert batch["is_padding"].equal(torch.arange(width) >= torch.tensor(lengths)[:, None])
    assert (batch["input_ids"][batch["is_padding"]] == PAD).all()
    learned = (batch["labels"] != IGNORE_INDEX) & batch["is_padding"]
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    added = batch["is_padding"].sum(1)
    if mode == "all":
        assert learned.equal(batch["is_padding"])
        assert "attention_mask" not in batch
    else:
        of_block = -torch.tensor(lengths) % 3
        expected = {"first": torch.ones_like(of_block), "none": torch.zeros_like(of_block), "block": of_block}[mode]
        assert learned.sum(1).equal(expected)
        assert (learned <= seen).all()
        assert (~seen).sum(1).equal(added - expected)


def test_an_unknown_mode_is_refused():
    with pytest.raises(DataError, match=r"supervise_padding: 'some' is not known\. Possible: all, first, none"):
        Collator(PAD, "some")
    with pytest.raises(DataError, match="'block' needs block_size"):
        Collator(PAD, "block")
