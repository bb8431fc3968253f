"""Which rows a step sees: the same whatever the number of processes, of GPUs, and of interruptions."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from chatglm_ptuning.training.sampler import SAMPLING_STRATEGIES, EpochSampler, PaddedRows

LENGTHS = [(7 * index) % 50 + 1 for index in range(197)]


def steps(processes, accumulation, strategy, per_device=3, epoch=0):
    """Rows of every step, as accelerate shares them among the processes."""
    sampler = EpochSampler(
        LENGTHS, per_device * processes * accumulation, 1, strategy, multiple_of=per_device * processes
    )
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, per_device, drop_last=False)
    shares = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    rows = PaddedRows([{"input_ids": [1, 2], "labels": [-100, 2]}] * len(LENGTHS), per_device * processes)
    seen = []
    for start in range(0, len(shares[0]), accumulation):
        step = [index for share in shares for batch in share[start : start + accumulation] for index in batch]
        assert all(set(rows[index].get("labels", [])) == {-100} for index in step if index >= len(LENGTHS))
        seen.append(sorted(index for index in step if index < len(LENGTHS)))
    return seen


@pytest.mark.parametrize("strategy", SAMPLING_STRATEGIES)
def test_every_step_has_the_same_rows_on_any_number_of_processes(strategy):
    alone = steps(1, 8, strategy)
    assert sorted(index for step in alone for index in step) == list(range(len(LENGTHS)))
    for processes, accumulation in ((2, 4), (4, 2), (8, 1)):
        assert steps(processes, accumulation, strategy) == alone
    assert (steps(2, 4, strategy, epoch=1) != alone) == (strategy != "sequential")


def test_the_order_depends_on_seed_and_epoch_alone_and_keeps_lengths_together():
    sampler = EpochSampler(LENGTHS, batch_size=4, seed=1)
    first = list(sampler)
    torch.rand(100)  # what a resumed run does to the global random state
    assert list(EpochSampler(LENGTHS, 4, 1)) == first
    assert list(EpochSampler(LENGTHS, 4, 2)) != first
    spread = [
        max(LENGTHS[i] for i in first[at : at + 4]) - min(LENGTHS[i] for i in first[at : at + 4])
        for at in range(0, len(first), 4)
    ]
    assert sum(spread) / len(spread) < 5
    with pytest.raises(ValueError, match="got 'longest'"):
        EpochSampler(LENGTHS, 4, 1, "longest")


def test_rows_that_fill_up_have_nothing_to_learn():
    rows = PaddedRows([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 5, 4)
    assert len(rows) == 8 and rows[4]["labels"] == [5, 6, 7]
    assert rows[5] == rows[7] == {"input_ids": [5, 6], "labels": [-100, -100]}
    with pytest.raises(IndexError):
        rows[8]
