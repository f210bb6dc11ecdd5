"""One run on several processes, which torchrun starts:

    torchrun --nproc_per_node=4 train.py ...            # each process takes its rows of every batch
    torchrun --nproc_per_node=4 train.py --shard ...    # and holds its part of each frozen layer alone (FSDP2)

What trains is small and the same everywhere, so after the backward pass its gradients are summed over the processes in
one message, with what all have to agree on: the loss, and whether anyone was asked to stop.  The first process prints
and saves.  Without torchrun there is one process, and nothing here does anything.
"""

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from model import Decoder

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: str) -> str:
    """Meet the other processes; returns this one's device."""
    if SIZE == 1:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def shard(model: Decoder, device: str):
    """Spread each block's frozen weights over the processes; they are gathered while the block is at work."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.split(":")[0], (SIZE,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
        for method in ("soft_kv", "step"):  # the two other ways into a block
            register_fsdp_forward_method(block, method)


def mine(batch: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """This process's rows of a batch of tensors (B, ..): every SIZE-th, from its rank on."""
    return tuple(x[RANK::SIZE] for x in batch)


def summed(parameters: Iterable[nn.Parameter], *numbers: float) -> Sequence[float]:
    """Sum the parameters' gradients over all processes, in place, and return the sums of the numbers."""
    if SIZE == 1:
        return numbers
    grads = [p.grad for p in parameters if p.grad is not None]
    numbers = torch.tensor(numbers, dtype=torch.float32, device=grads[0].device)
    whole = torch.cat([*(g.flatten() for g in grads), numbers])
    dist.all_reduce(whole)
    *sums, numbers = whole.split([*(g.numel() for g in grads), len(numbers)])
    for g, s in zip(grads, sums):
        g.copy_(s.view_as(g))
    return numbers.tolist()


def wait():
    """Until all processes are here."""
    if SIZE > 1:
        dist.barrier()


def leave():
    """Part from the other processes, if they met."""
    if dist.is_initialized():
        dist.destroy_process_group()
