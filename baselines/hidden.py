"""IAPT where the instruction is hidden (`--hide-instruction`): soft tokens stand in its place.  One layer:

    def summary(H, instr, K_words, V_words, W_down, W_sa, R, W_up):
        Z = rms_norm(H) @ W_down                                                   # (T, m)
        A = (Z @ W_sa + parts).masked_fill(~instr[:, None], -torch.inf).softmax(0) # (T, P)  at first, means of P parts
        Q = rms_norm(A.T @ Z)                                                      # (P, m)
        S_k, S_v = (R(Q) @ W_up).chunk(2, 1)                                       # (P, K)  each, zero at the start
        return A.T @ K_words + S_k, A.T @ V_words + S_v                            # P keys, P values
    #   and in attention:  y = attend(q, [k_first, k_soft, k_input], [v_first, v_soft, v_input])

K_words and V_words (T, K) are the instruction's keys and values in the frozen model, before their rotation; k_soft is
turned to the mean position of what it averages.  So soft tokens speak the frozen model's language from the start.  The
first word's key and value, k_first and v_first, stay as they are: it is a sink, on which attention rests that nothing
else wants.
"""

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
        # (B, T), 0 to P.  The middle of a word on the border of two parts is taken to be in the later one.
        place = (torch.arange(Z.shape[1], device=Z.device) + 0.501) / instr.sum(-1, keepdim=True) * P
        outside = ((place[..., None] - torch.arange(P, device=Z.device) - 0.5).abs() - 0.5).clamp(min=0)  # of a part
        part = outside <= outside.amin(1, keepdim=True)  # of one that has no word in it, the nearest
        return (Z @ self.W_sa + 4.0 * part).masked_fill(~instr[..., None], -torch.inf).softmax(-2)


class Summary(IAPT):
    """P averages of the instruction's own keys and values a layer, corrected; they stand among the words.

    C m parameters shared by all layers, and in each layer m P + 12 + 2 m K.  m = 0 stands for C / 16.
    """

    separate = False
    generator = SummaryGenerator

    def __init__(self, config: Config, P: int = 4, m: int = 0, activation: Activation = "rational"):
        super().__init__(config, P, m, 0, activation)
        self.keys, self.values, self.config = nn.ParameterList(), nn.ParameterList(), config
        self.lr = 6.0 / config.n_embd

    def soft(self, block: Block, l: int, x: Tensor, A: Tensor, S: Tensor) -> Soft:
        words, (S_k, S_v) = block.soft_kv(x), (block.attn.heads(s) for s in S.chunk(2, -1))
        rope = rotary(self.config, self.position(A)) if self.config.arch == "llama" and block.attn.turns else None
        A = A.mT[:, None]  # (B, 1, P, T)
        return Soft(rotate(A @ words.k.float() + S_k, rope), A @ words.v.float() + S_v)

    def position(self, A: Tensor) -> Tensor:
        """The mean position (B, P) of what each soft token is an average of."""
        return A.mT @ torch.arange(A.shape[1], device=A.device).float()
