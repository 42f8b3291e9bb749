"""An order of the pairs in which those of one prompt follow each other, so that they meet in a batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import RandomSampler


class PromptOrder(RandomSampler):
    """Yield the rows of a table prompt by prompt: the prompts in random order, and so the pairs of each.

    Args:
        prompts: the prompt of each row; equal ones are those of one prompt.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(range(len(prompts)))
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(tuple(prompt), []).append(row)
        self.groups = list(rows.values())
        self.generator: Any = None

    def __iter__(self) -> Iterator[int]:
        for group in torch.randperm(len(self.groups), generator=self.generator).tolist():
            rows = self.groups[group]
            yield from (rows[place] for place in torch.randperm(len(rows), generator=self.generator).tolist())
