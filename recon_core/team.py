"""The processes that train together: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team:
    """Rank and size of a training run, and what its ranks do collectively.

    Every rank draws the whole batch and takes its share, so that a run is determined by its seed and
    does not depend on the number of processes.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1):
        self.device, self.rank, self.size = device, rank, size

    @classmethod
    @contextmanager
    def join(cls, device: str = "auto") -> Iterator[Team]:
        """The team described by torchrun's environment, or a single process without it; left when the context exits.

        Args:
            device: auto (one GPU per process if CUDA is available), cpu or cuda.

        Raises:
            ValueError: if CUDA was requested but is not available.
        """
        cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, but torch finds no CUDA device; use device auto or cpu")
        defaults = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
        size, rank, local = (int(os.environ.get(name, default)) for name, default in defaults.items())
        where = torch.device("cuda", local) if cuda else torch.device("cpu")
        if size == 1:
            yield cls(where)
            return
        if cuda:
            torch.cuda.set_device(where)  # otherwise nccl guesses it from the global rank, wrong with several machines
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            yield cls(where, rank, size)
            dist.barrier()  # no rank may leave while another is still communicating
        finally:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This rank's share of a batch [n ...], on its device."""
        return batch[self.rank :: self.size].to(self.device, non_blocking=True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with its gradients averaged over the team."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def gather(self, values: Tensor) -> Tensor:
        """The values [n] of all ranks, in the order of the batch that `share` split."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts, dim=1).flatten()
