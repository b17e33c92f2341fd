"""A row's noise depends on the seed, the epoch and the row itself, and on nothing else."""

import torch

from memdlm.training.noise import SOFT, TIMES, UNIFORM, WRITE, add_noise, evaluation_noise
from memdlm.training.rows import SAMPLE

DRAWN = (TIMES, UNIFORM, SOFT)


def noised(samples=(3, 5), *, seed=0, epoch=0, step=0, stratified=False, length=7):
    batch = {SAMPLE: list(samples), "input_ids": torch.zeros(len(samples), length, dtype=torch.int64)}
    add_noise([batch], seed=seed, epoch=epoch, step=step, stratified=stratified)
    return batch


def alike(one, other):
    """Which of the draws are the same in both."""
    same = {name for name in DRAWN if one[name].equal(other[name])}
    return same | ({WRITE} if one[WRITE] == other[WRITE] else set())


def test_every_epoch_and_every_seed_has_its_own_noise():
    first = noised()
    assert alike(first, noised()) == {*DRAWN, WRITE}
    assert alike(first, noised(epoch=1)) == set()
    assert alike(first, noised(seed=1)) == set()


def test_a_row_has_the_same_noise_wherever_and_whenever_in_the_epoch_it_comes():
    alone, among = noised([5]), noised([3, 5, 9], step=4)
    for name in DRAWN:
        assert among[name][1].equal(alone[name][0])
        assert not among[name][0].equal(alone[name][0])
    assert among[WRITE][1] == alone[WRITE][0]


def test_the_draws_of_a_row_are_independent_of_each_other():
    batch = noised([5], length=4)
    drawn = [batch[TIMES].item(), batch[SOFT].item(), *batch[UNIFORM][0].tolist()]
    assert len(set(drawn)) == len(drawn)


def test_stratified_times_fill_every_stratum_once_in_an_order_of_the_step():
    samples = list(range(8))
    first, later = (noised(samples, step=step, stratified=True)[TIMES] for step in (0, 1))
    for times in (first, later):
        assert (times * 8).floor().sort().values.tolist() == list(range(8))
    assert not first.mul(8).floor().equal(later.mul(8).floor())
    assert noised(samples, stratified=True)[TIMES].equal(first)
    assert noised(samples, stratified=True, epoch=1)[UNIFORM].equal(noised(samples, epoch=1)[UNIFORM])


def test_evaluation_noise_belongs_to_the_row():
    times, uniform = evaluation_noise(0, [2, 7], (2, 5))
    again, alone = evaluation_noise(0, [7], (1, 5))
    assert again[0].equal(times[1])
    assert alone[0].equal(uniform[1])
    other, _ = evaluation_noise(1, [2, 7], (2, 5))
    assert not other.equal(times)
    even, _ = evaluation_noise(0, range(144), (144, 1))
    # Multiples of the golden ratio leave no gap wider than about 1.7 / n.
    gaps = even.sort().values.diff()
    assert gaps.max() < 2 / 144
