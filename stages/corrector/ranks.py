"""The processes of one training, each with its own rows of every batch, and what they add up.

A loss is a mean over the batch.  Each rank divides what its own rows give by what the rows of all
count, so that losses and gradients of the batch are plain sums over the ranks, whatever their
number.  The sums are written out, not left to DistributedDataParallel: that averages over ranks,
which is another thing where rows weigh differently, and hides the sum of gradients behind the
backward pass, which gains nothing for weights of a few megabytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from evenlight.stages.corrector.launch import Lost, launched

PATIENCE = timedelta(minutes=30)  # with a rank that is alive and says nothing


@dataclass(frozen=True)
class Ranks:
    """One process among those of a training.  Every method is called by all of them alike."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this one writes the run and speaks for all."""
        return self.rank == 0

    def rows(self, num_rows: int) -> range:
        """Its own of the rows of a batch: dealt in turn, so that each has some of every stream."""
        return range(self.rank, num_rows, self.count)

    def own(self, first: int, stop: int) -> slice:
        """Where among its own rows those lie that the batch has from first up to stop."""
        return slice(*(max(0, -((self.rank - at) // self.count)) for at in (first, stop)))

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, the same on each; without gradient.

        Raises Lost where a rank is gone.
        """
        if self.count == 1:
            return x.detach()
        summed = x.detach().clone()
        with _all_there():
            dist.all_reduce(summed)
        return summed

    def totals(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The same of some numbers at once, by name."""
        summed = self.total(torch.stack(list(values.values())))
        return dict(zip(values, summed.tolist(), strict=True))

    def add_up(self, gradients: list[Tensor]) -> None:
        """Make each the sum of it over the ranks, in place."""
        if self.count > 1:
            summed = self.total(torch.cat([x.flatten() for x in gradients]))
            sizes = [x.numel() for x in gradients]
            for x, total in zip(gradients, summed.split(sizes), strict=True):
                x.copy_(total.view_as(x))

    def each(self, value: float) -> list[float]:
        """What every rank gives, by rank."""
        values = torch.zeros(self.count, dtype=torch.float64)
        values[self.rank] = value
        return self.total(values).tolist()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 first, then the others: what it refuses is refused, and said, once."""
        if not self.leads:
            self.each(0)
        yield
        if self.leads:
            self.each(0)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started; alone where it did not.

    Gloo adds up what lies in host memory, NCCL what lies on CUDA devices.
    """
    launch = launched()
    if launch.count == 1:
        yield ALONE
        return
    on_cuda = torch.cuda.is_available() and dist.is_nccl_available()
    with _all_there():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(launch.rank, launch.count)
    finally:
        dist.destroy_process_group()


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # Gloo and NCCL have no other base of errors
        raise Lost(
            "another process of this training is gone, torchrun says which and how: "
            "run the same command again, which goes on from the last checkpoint"
        ) from error
