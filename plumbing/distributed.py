"""One run on several processes, started by torchrun:

    torchrun --nproc_per_node=4 train.py ...            # each process takes its rows of every batch
    torchrun --nproc_per_node=4 train.py --shard ...    # and holds only its part of each frozen layer (FSDP2)

The trained parameters are few and the same in every process.  After the backward pass, one all-reduce sums their
gradients together with the numbers that all processes have to agree on: the loss, and whether one of them was asked to
stop.  The first process prints and saves.  Without torchrun there is one process, and these functions do nothing.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from model import Decoder

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0


def problem(args: Namespace) -> str:
    """What the options of train.py ask of several processes that cannot be done; or ""."""
    if args.batch_size % WORLD_SIZE:
        return f"--batch-size {args.batch_size} is not a multiple of the {WORLD_SIZE} processes"
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if WORLD_SIZE > 1 and 0 < gpus < here and args.device.startswith(("auto", "cuda")):
        return f"torchrun starts {here} processes here, and there are {gpus} GPUs: lower --nproc_per_node"
    if args.shard and (WORLD_SIZE == 1 or args.method == "full"):
        return "--shard is for torchrun with several processes, and for methods that leave the model frozen"
    if args.shard and args.checkpoint and args.compile:
        return "--shard, --checkpoint and --compile do not work together: leave one of them out"
    return ""


def init(device: str) -> str:
    """Connect to the other processes.  Returns the device of this one.  From now on the first one speaks for all."""
    if WORLD_SIZE == 1:
        return device
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def shard(model: Decoder, device: str):
    """Spread each block's frozen weights over the processes' devices.  They are gathered while the block computes.

    Block by block: all of the model never has to fit on one device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.split(":")[0], (WORLD_SIZE,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
        for method in ("soft_kv", "step"):  # methods other than forward that use the weights
            register_fsdp_forward_method(block, method)
    model.to(device)


def seed_step(seed: int, step: int):
    """The random numbers of a step, other ones in each process."""
    # In the low 32 bits: a CPU's generator takes no more of a seed.
    torch.manual_seed((seed * 1_000_003 + step + RANK * 2_654_435_761) % 2**32)


def local_rows(batch: NamedTuple) -> NamedTuple:
    """This process's rows of a batch, a named tuple of tensors (B, ...): every WORLD_SIZE-th row, starting at RANK."""
    return batch._make(x[RANK::WORLD_SIZE] for x in batch)


def all_reduce_grads(parameters: Iterable[nn.Parameter], *numbers: float) -> Sequence[float]:
    """Sum the parameters' gradients over all processes, in place.  Returns the sums of the numbers."""
    if WORLD_SIZE == 1:
        return numbers
    grads = [p.grad for p in parameters if p.grad is not None]
    numbers = torch.tensor(numbers, dtype=torch.float32, device=grads[0].device)
    flat = torch.cat([*(g.flatten() for g in grads), numbers])
    dist.all_reduce(flat)
    *sums, numbers = flat.split([*(g.numel() for g in grads), len(numbers)])
    for grad, total in zip(grads, sums):
        grad.copy_(total.view_as(grad))
    return numbers.tolist()


def progress(items: Iterable | None = None, name: str = "", delay: float = 1.0, **settings) -> tqdm:
    """A bar on the terminal, if there is one, for what takes longer than `delay` seconds; the first process's alone."""
    return tqdm(items, name or None, delay=delay, dynamic_ncols=True, disable=RANK > 0 or None, **settings)


def barrier():
    """Wait for all processes."""
    if WORLD_SIZE > 1:
        dist.barrier()


def shutdown():
    """Disconnect from the other processes, if `init` connected to them."""
    if dist.is_initialized():
        dist.destroy_process_group()
