"""What IAPT's generators read: behind --explain, and the pictures of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import Decoder, Tuner


@torch.no_grad()
def reading_weights(model: Decoder, tuner: Tuner, prompt: list[int]) -> Tensor:
    """How much each of the P readings of each layer takes of each of a prompt's T tokens: (L, P, T)."""
    idx, weights = torch.tensor([prompt], device=model.wte.weight.device), []

    def note(generator, inputs):
        H, instr = inputs
        weights.append(generator.attention(generator.project(H), instr)[0].mT)

    hooks = [generator.register_forward_pre_hook(note) for generator in tuner.generators]
    model.hidden(idx, torch.ones_like(idx, dtype=torch.bool), tuner)
    for hook in hooks:
        hook.remove()
    return torch.stack(weights)


# The least weight of a shade, and its colours (ANSI codes of background and text).
SHADES = ((0.4, "48;5;25;38;5;231"), (0.2, "48;5;68;38;5;231"), (0.1, "48;5;111;38;5;16"), (0.05, "48;5;153;38;5;16"))


def shade_words(words: list[str], weights: Tensor, color: bool) -> Iterator[str]:
    """What each soft token reads, weights (L, P, T), as lines of text: the words, darker where the weight is larger.

    Without color: the words with a weight of 0.05 or more, and their weights.  The first line is the legend.
    """
    least = SHADES[-1][0]
    legend = "darker: more" if color else f"the words with a weight of {least} or more; all weights of a token sum to 1"
    yield f"What each soft token reads ({legend}):"
    for l, layer in enumerate(weights, 1):
        for p, row in enumerate(layer.tolist(), 1):
            if color:
                shades = [next((shade for lowest, shade in SHADES if w >= lowest), "0") for w in row]
                text = "".join(f"\x1b[{shade}m{word}\x1b[0m" for word, shade in zip(words, shades))
            else:
                ranked = sorted(zip(row, words), reverse=True)
                text = "  ".join(f"{word.strip()} {w:.2f}" for w, word in ranked if w >= least)
            yield f"layer {l:2}, token {p}:  {text}"
