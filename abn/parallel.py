"""Several processes, on several GPUs or hosts, that together do what one does: started by torchrun, or by `launch`.

Every process prepares every batch whole, from the same generator, and takes a part of it through the network. Batch
norms see the statistics of all parts, the answers are gathered, and each process computes the loss of the whole batch;
the mean of their gradients is that of one process, up to rounding. What happens in the network at random (dropout)
differs. Without torchrun nothing here does anything.

Processes on several hosts need the workspace at the same path, on a disk that they share. The first one alone writes,
but for the shards of predictions.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from abn.model import ABN, ABNOutput

PATIENCE = timedelta(days=1)  # with a process that does alone what the others wait for; a dead one torchrun notices
PR_SET_PDEATHSIG = 1
Result = TypeVar("Result")
Item = TypeVar("Item")


def launch(module: str, processes: int) -> None:
    """Become a torchrun of so many processes of `python -m module` on this machine, unless this is one of them or one
    is enough."""
    if processes > 1 and not dist.is_torchelastic_launched():
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", module])


@contextmanager
def together() -> Iterator[None]:
    """Within this block the processes that torchrun has started know each other."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if sys.platform == "linux":  # a torchrun that is killed must not leave them writing
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def alone() -> bool:
    return not dist.is_initialized()


def is_first() -> bool:
    return alone() or dist.get_rank() == 0


def from_first(compute: Callable[[], Result]) -> Result:
    """What the first process computes, in all of them."""
    if alone():
        return compute()
    box = [compute() if is_first() else None]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def mine(items: Sequence[Item]) -> Sequence[Item]:
    """Of the items this process's, where each has its turn."""
    return items if alone() else items[dist.get_rank() :: dist.get_world_size()]


def wait() -> None:
    """For the other processes."""
    if not alone():
        dist.barrier()


def answer(network: ABN, images: Tensor) -> ABNOutput:
    """What `network` says of all `images`, each process having asked it about a part of them."""
    if alone():
        return network(images)
    part = _part(len(images))
    return ABNOutput(*(_gathered(rows, part, len(images)) for rows in network(images[part])))


def squared_gradients(own: Tensor) -> Tensor:
    """Of the rows of all processes, where each has those of its part, of a sum that each has computed whole."""
    return own if alone() else _Sum.apply(own) / dist.get_world_size() ** 2


def average_gradients(network: nn.Module) -> None:
    """Each parameter's gradient becomes its mean over the processes."""
    if alone():
        return
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(whole)
    whole /= dist.get_world_size()
    for gradient, flat in zip(gradients, whole.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(flat.view_as(gradient))


def share_statistics(network: nn.Module) -> None:
    """From now on the batch norms of `network` normalise by the statistics of all processes."""
    if alone():
        return
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SharedBatchNorm


class SharedBatchNorm(nn.BatchNorm2d):
    """torch's own, SyncBatchNorm, knows no CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        x = input.float()
        count = _Sum.apply(x.new_tensor(x.numel() / x.shape[1]))
        mean = _Sum.apply(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class _Sum(torch.autograd.Function):
    """Over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def _part(count: int) -> slice:
    """The rows of this process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(count * rank // size, count * (rank + 1) // size)


def _gathered(rows: Tensor, part: slice, count: int) -> Tensor:
    """The rows of all processes; parts need not be equally long."""
    whole = rows.new_zeros((count, *rows.shape[1:]))
    whole[part] = rows
    return _Sum.apply(whole)
