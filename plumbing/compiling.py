"""torch.compile, behind --compile of train.py and of sample.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from model import Cache, Decoder, Tuner
from plumbing.cli import UsageError


def check_compiler(device: str | torch.device):
    """Raise UsageError if torch.compile cannot work here, as without a C++ compiler."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.zeros(8, device=device))
    except Exception as e:
        reason = str(e).partition("\n")[0][:200]
        raise UsageError(f"--compile finds no compiler ({reason}): install g++ or clang++, or leave it out") from None


def compile_parts(model: Decoder, tuner: Tuner, **settings):
    """Compile each block of the model and each generator of the tuner, in place; settings are torch.compile's.

    All blocks share their graphs, and so do all generators: a model of 30 blocks is compiled as fast as one of two.
    The learned activation is compiled with its generator.  Alone, on 8 x 4 x 36 numbers, forward and backward, it takes
    0.32 ms in place of 0.46 (one thread of a CPU).  A second way to write it, by Horner's rule, would take 0.23 ms: too
    little, beside a layer's 30 ms, to have the activation twice.
    """
    import torch._dynamo.config as dynamo  # its import takes as long as that of torch

    dynamo.recompile_limit = 256  # beyond the limit, which is 8 by default, a part goes on without being compiled
    # What acts on the answer alone has all generators computed at once: there is little left to fuse.
    generators = getattr(tuner, "generators", ()) if tuner.act == "all" else ()
    for part in (*model.h, *generators):
        part.compile(**settings)


def compiled_step(model: Decoder) -> Callable[[Tensor, Cache], Tensor]:
    """`model.step`, compiled in one graph when it is first called; on a GPU, a CUDA graph.

    The weights become constants, packed for a CPU's matrix products: no weight may change after it.
    """
    import torch._inductor.config as inductor

    quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    options = {name: value for name, value in quiet.items() if hasattr(inductor, name)}  # older PyTorch lacks one
    options |= {"max_autotune": True, "triton.cudagraphs": model.wte.weight.is_cuda}
    step = torch.compile(model.step, fullgraph=True, options=options)

    def frozen_step(idx, cache):
        with inductor.patch(freezing=True):  # as an option of torch.compile it has no effect
            return step(idx, cache)

    return frozen_step
