"""IAPT where the instruction is hidden (`--hide-instruction`): soft tokens stand in its place."""

import torch
import torch.nn as nn
from torch import Tensor

from iapt import IAPT, Activation, Generator
from model import Block, Config, Soft, rotary, rotate


class SummaryGenerator(Generator):
    """At first its P readings are the means of P parts of the instruction of equal length."""

    def __init__(self, W_down: nn.Parameter, K: int, P: int, activation: Activation):
        super().__init__(W_down, 2 * K, P, activation)
        nn.init.zeros_(self.W_sa)

    def attention(self, Z: Tensor, instr: Tensor) -> Tensor:
        P = self.W_sa.shape[1]
        place = (torch.arange(Z.shape[1], device=Z.device) + 0.5) / instr.sum(-1, keepdim=True) * P  # (B, T), 0 to P
        part = place[..., None].floor() == torch.arange(P, device=Z.device)
        return (Z @ self.W_sa + 4.0 * part).masked_fill(~instr[..., None], -torch.inf).softmax(-2)


class Summary(IAPT):
    """P soft tokens a layer, for `--hide-instruction`: averages of the instruction's own keys and values, corrected.

        A                        as above, but W_sa starts at zero, and A at the means of P parts of equal length
        keys, values             = A.T @ K_words + S_k,  A.T @ V_words + S_v        S = R(Q) @ W_up  (P, 2 K)

    They stand among the words, in one softmax with them, at the mean position of what they average.
    """

    separate = False
    generator = SummaryGenerator

    def __init__(self, config: Config, P: int = 4, m: int = 0, activation: Activation = "rational"):
        super().__init__(config, P, m, 0, activation)
        self.keys, self.values, self.config = nn.ParameterList(), nn.ParameterList(), config
        self.lr = 6.0 / config.n_embd

    def soft(self, block: Block, l: int, x: Tensor, A: Tensor, S: Tensor) -> Soft:
        words, (S_k, S_v) = block.soft_kv(x), (block.attn.heads(s) for s in S.chunk(2, -1))
        A = A.mT[:, None]  # (B, 1, P, T)
        position = A[:, 0] @ torch.arange(A.shape[-1], device=A.device).float()  # (B, P)
        rope = rotary(self.config, position) if self.config.arch == "llama" else None
        return Soft(rotate(A @ words.k.float() + S_k, rope), A @ words.v.float() + S_v)
