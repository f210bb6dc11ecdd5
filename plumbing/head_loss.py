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


def head_loss(
    model: Decoder, x: Tensor, targets: Tensor, teacher: Tensor | None = None, distill: float = 1.0
) -> Tensor:
    """`model.loss(x, targets)`, computed by HeadLoss where the head is frozen.

    Given the last states of a teacher (N, C), of the N tokens that have a target, it is the mean of

        distill KL(teacher || model) + (1 - distill) cross-entropy
    """
    if teacher is None and (model.head.weight.requires_grad or not x.requires_grad):
        return model.loss(x, targets)
    return HeadLoss.apply(x[targets >= 0], model.head.weight, targets[targets >= 0], teacher, distill)[0]


class HeadLoss(torch.autograd.Function):
    """Mean loss, in nats, of logits x W^T (N, V) against targets (N,), and a teacher's logits, for a frozen W.

    The gradient with respect to x, (softmax - wanted) W / N, is computed with the loss, in one table of LOGITS logits.
    Wanted is one-hot; with a teacher, distill times its softmax and 1 - distill times one-hot.
    """

    LOGITS = 2**24

    @staticmethod
    def forward(x, weight, targets, teacher, distill):
        loss, dx = x.new_zeros((), dtype=torch.float32), torch.empty_like(x)
        N, rows = max(1, len(x)), max(1, HeadLoss.LOGITS // len(weight))
        hard = 1.0 if teacher is None else 1 - distill  # the share of the targets
        for i in range(0, len(x), rows):
            logits, t = F.linear(x[i : i + rows], weight).float(), targets[i : i + rows, None]
            logits -= logits.amax(1, keepdim=True)
            loss -= hard * logits.gather(1, t).sum()
            if teacher is not None:
                log_p = F.linear(teacher[i : i + rows], weight).float().log_softmax(1)
                p = log_p.exp()
                loss += distill * (p * (log_p - logits)).sum()
            total = logits.exp_().sum(1, keepdim=True)
            loss += total.log().sum()
            logits.div_(total).scatter_add_(1, t, torch.full_like(t, -hard, dtype=torch.float32))  # softmax - wanted
            if teacher is not None:
                logits -= distill * p
            torch.mm(logits.div_(N).to(weight.dtype), weight, out=dx[i : i + rows])
        return loss / N, dx

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return ctx.saved_tensors[0] * g, None, None, None, None
