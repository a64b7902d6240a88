"""Work for a training loop that is done in processes of its own, so that the loop keeps the interpreter to itself."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

IMPORTED_ONCE = ["recon_core.batches", "recon_core.rehearsal"]


def made_elsewhere(work: Dataset, workers: int, **loading: Any) -> Iterator[Any]:
    """The items of `work`, in order, made ahead by `workers` processes; closing this ends them.

    They are forks of a process that never saw CUDA, which would break, and that has imported the modules once for all of them.

    Args:
        work: of the kind that DataLoader takes.
        loading: further arguments of DataLoader.

    Raises:
        ValueError: that `work` raised, in its own words.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTED_ONCE)
    work = (_QuietStream if isinstance(work, IterableDataset) else _QuietItems)(work)
    for item in DataLoader(work, batch_size=None, num_workers=workers, multiprocessing_context=processes, **loading):
        if isinstance(item, ValueError):
            raise item
        yield item


class _QuietItems(Dataset):
    """Hands a ValueError over instead of raising it, or its sentence would drown in a traceback."""

    def __init__(self, work: Dataset):
        self.work = work

    def __getitem__(self, number: int) -> Any:
        try:
            return self.work[number]
        except ValueError as error:
            return error


class _QuietStream(IterableDataset):
    """The same of what has no numbers."""

    def __init__(self, work: IterableDataset):
        self.work = work

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.work
        except ValueError as error:
            yield error
