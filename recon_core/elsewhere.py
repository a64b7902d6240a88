"""Work for a training loop, done in separate processes so that the loop does not share the interpreter (GIL)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

IMPORTED_ONCE = ["recon_core.batches", "recon_core.rehearsal"]


def made_elsewhere(work: Dataset, workers: int, **loading: Any) -> Iterator[Any]:
    """The items of `work`, in order, made ahead by `workers` processes; closing the iterator ends them.

    The processes are forked from a server that has never initialised CUDA, which does not survive a fork, and that has
    imported the modules once for all of them.

    Args:
        work: a dataset for DataLoader.
        loading: further arguments of DataLoader.

    Raises:
        ValueError: raised by `work`, with its original message.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTED_ONCE)
    work = (_QuietStream if isinstance(work, IterableDataset) else _QuietItems)(work)
    for item in DataLoader(work, batch_size=None, num_workers=workers, multiprocessing_context=processes, **loading):
        if isinstance(item, ValueError):
            raise item
        yield item


class _QuietItems(Dataset):
    """Returns a ValueError instead of raising it, which would bury its message in a traceback."""

    def __init__(self, work: Dataset):
        self.work = work

    def __getitem__(self, number: int) -> Any:
        try:
            return self.work[number]
        except ValueError as error:
            return error


class _QuietStream(IterableDataset):
    """The same for an iterable dataset."""

    def __init__(self, work: IterableDataset):
        self.work = work

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.work
        except ValueError as error:
            yield error
