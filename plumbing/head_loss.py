"""The loss of a frozen head that keeps no logits: they are the largest tensor of a training step.

With 512 targets and SmolLM2's 49,152 tokens it keeps 1.2 MB for the backward pass, where cross-entropy of the logits
keeps 315, and takes 0.83 of the time (fp32, a CPU).  PyTorch 2.13 has linear_cross_entropy, which keeps as little in
chunks.  But it takes five times as long there, as it computes the weight's gradient, too, and in bf16 its loss is up to
3 % too low (findings/linear_cross_entropy_in_bf16.sh).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Decoder


def head_loss(model: Decoder, x: Tensor, targets: Tensor) -> Tensor:
    """`model.loss(x, targets)`, computed by HeadLoss where the head is frozen."""
    if model.head.weight.requires_grad or not x.requires_grad:
        return model.loss(x, targets)
    return HeadLoss.apply(x[targets >= 0], model.head.weight, targets[targets >= 0])[0]


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy, in nats, of logits x W^T (N, V) against targets (N,), for a frozen W.

    The gradient with respect to x, (softmax - one-hot) W / N, is computed with the loss, in one table of LOGITS logits.
    """

    LOGITS = 2**24

    @staticmethod
    def forward(x, weight, targets):
        loss, dx = x.new_zeros((), dtype=torch.float32), torch.empty_like(x)
        N, rows = max(1, len(x)), max(1, HeadLoss.LOGITS // len(weight))
        for x_part, t, dx_part in zip(x.split(rows), targets[:, None].split(rows), dx.split(rows)):
            logits = F.linear(x_part, weight).float()
            logits -= logits.amax(1, keepdim=True)
            loss -= logits.gather(1, t).sum()
            total = logits.exp_().sum(1, keepdim=True)
            loss += total.log().sum()
            logits.div_(total).scatter_add_(1, t, -torch.ones_like(total)).div_(N)  # softmax - one-hot
            torch.mm(logits.to(weight.dtype), weight, out=dx_part)
        return loss / N, dx

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return ctx.saved_tensors[0] * g, None, None
