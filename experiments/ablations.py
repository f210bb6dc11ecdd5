"""Forms of IAPT that only a table needs, each with one thing changed, and three controls at inference."""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from data import Example, p3
from data.scores import score_examples
from iapt import IAPT, Generator, PaperIAPT, linear
from model import Block, Config, Decoder, Embedded, Soft, Tuner


class Joined(IAPT):
    """Soft tokens in the softmax of the words."""

    separate = False


class RandomStart(IAPT):
    """Values and W_up start at random, at a tenth of the keys' scale, not at zero."""

    def start(self, model: Decoder):
        for value in self.values:
            nn.init.normal_(value, std=0.1)
        for generator in self.generators:
            nn.init.normal_(generator.up.weight, std=0.1 * generator.up.in_features**-0.5)


class Unscaled(IAPT):
    """H and Q as they are, not at unit mean square."""

    generator = Generator


class OwnDown(IAPT):
    """Each layer has its own W_down."""

    def __init__(self, config: Config, P: int = 4, m: int = 4, repeat: int = 3):
        super().__init__(config, P, m, repeat)
        for generator in self.generators:
            generator.down = linear(config.n_embd, m, std=config.n_embd**-0.5)


class TaskTable(Generator):
    """In place of what is read: a row of a table, which all layers share."""

    def pool(self, x: Tensor, instr: Tensor) -> Tensor:
        """Here x (B,) are numbers of tasks, -1 for an unknown one, whose row is zero -> Q (B, P, m)."""
        q = F.rms_norm(self.table, self.table.shape[-1:], eps=1e-4)
        return F.pad(q, (0, 0, 0, 0, 0, 1))[x]


class ToldTheTask(IAPT):
    """It is told which task a row is of, and reads nothing: what is it worth to know the task?

    `tell` says which prompt is of which task.  A prompt that it has not named has none.  learned = 0: each task keeps
    the random Q that it started with, so tasks that are alike cannot come to have a similar one.
    """

    generator = TaskTable

    def __init__(self, config: Config, P: int = 4, m: int = 0, repeat: int = 3, tasks: int = 64, learned: bool = True):
        super().__init__(config, P, m, repeat)
        table = torch.randn(tasks, P, self.generators[0].up.in_features)
        table = nn.Parameter(table) if learned else nn.Buffer(table)
        for generator in self.generators:
            generator.table, generator.down, generator.w_sa = table, None, None
        self.task_of_prompt = {}

    def tell(self, rows: dict[str, list[dict]], examples: dict[str, list[Example]]):
        """The tasks of all rows, before training; those of the training rows have numbers."""
        names = sorted({p3.family(row.get("task", "")) for row in rows["train"]})
        if not all(names):
            raise ValueError("told-the-task wants rows with a task: a training row has none")
        if len(names) > len(self.generators[0].table):
            raise ValueError(f"{len(names)} tasks in the training rows: -o tasks={len(names)}")
        number = {name: i for i, name in enumerate(names)}
        for split, part in examples.items():
            for row, example in zip(rows[split], part):
                task = number.get(p3.family(row.get("task", "")), -1)
                if self.task_of_prompt.setdefault(tuple(example.prompt), task) != task:
                    raise ValueError(f"rows of two tasks have one prompt: {row}"[:300])

    def attach(self, model: Decoder):
        self.hook = model.wte.register_forward_pre_hook(self.note_ids)

    def detach(self):
        self.hook.remove()

    def note_ids(self, embedding: nn.Module, inputs: tuple):
        self.ids = inputs[0]

    def embed(self, x: Tensor, instr: Tensor) -> Embedded:
        if not self.task_of_prompt:
            raise RuntimeError("told-the-task has not been told any task: call tell first")
        prompts = [tuple(ids[read].tolist()) for ids, read in zip(self.ids, instr)]
        self.tasks = torch.tensor([self.task_of_prompt.get(prompt, -1) for prompt in prompts], device=x.device)
        return Embedded(x)

    def kv(self, block: Block, l: int, x: Tensor, instr: Tensor) -> Soft:
        return super().kv(block, l, self.tasks, instr)  # `embed` has noted the tasks: here there are no ids

    def groups(self, lr: float) -> list[dict]:
        """The table learns at the constants' rate: at the generator's, the form is no better than IAPT (LOG.md)."""
        rest, constants, coefficients = super().groups(lr)
        table = self.generators[0].table
        rest["params"] = [p for p in rest["params"] if p is not table]
        codes = [table] if table.requires_grad else []
        return [rest, constants | {"params": [*codes, *constants["params"]]}, coefficients]


class PaperRandomStart(PaperIAPT):
    """The paper's form, with a W_up that starts at random."""

    def start(self, model: Decoder):
        pass


ABLATIONS = {
    "joined": Joined,
    "random-start": RandomStart,
    "unscaled": Unscaled,
    "own-down": OwnDown,
    "told-the-task": ToldTheTask,
    "paper-random-start": PaperRandomStart,
}


# -- Controls at inference ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def removing(hooks: list[RemovableHandle]):
    """Removes the hooks at the end of the with block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def swapped_instruction(tuner: Tuner):
    """Every generator reads the instruction of another row of the batch (in a batch of one row, its own)."""

    def roll(_, inputs):
        return tuple(x.roll(len(x) // 2, 0) for x in inputs)

    with removing([g.register_forward_pre_hook(roll) for g in tuner.generators]):
        yield


def swapped_within_tasks(tuner: Tuner, model: Decoder, examples: list[Example], tasks: Sequence[str]) -> Tensor:
    """The nats of each example where every generator reads another example of its task (N,); alone, its own."""
    nats = torch.zeros(len(examples))
    with swapped_instruction(tuner):
        for task in set(tasks):
            rows = [i for i, name in enumerate(tasks) if name == task]  # a batch has rows of this task alone
            nats[rows] = score_examples(model, [examples[i] for i in rows], tuner)[0].float()
    return nats


@contextlib.contextmanager
def mean_output(tuner: Tuner, model: Decoder, examples: list[Example]):
    """Every generator writes the mean of what it writes for `examples`, whatever the instruction."""
    sums = {g: 0.0 for g in tuner.generators}
    rows = dict.fromkeys(sums, 0)

    def collect(g, inputs, out):
        sums[g] = sums[g] + out.sum(0)
        rows[g] += len(out)

    def replace(g, inputs, out):
        return (sums[g] / rows[g]).expand_as(out)

    with removing([g.register_forward_hook(collect) for g in tuner.generators]):
        score_examples(model, examples, tuner)
    with removing([g.register_forward_hook(replace) for g in tuner.generators]):
        yield
