"""From the plan to micro-batches: the packs of a step, collated one micro-batch after another.

Sources (prepared, encoded) ─> Planner: windows of packs ─> MicroBatches: Batch after Batch
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import IterableDataset

from sft.collate import collate
from sft.planner import Planner
from sft.prepared import Sources
from sft.sample import Batch, Pack


class MicroBatches(IterableDataset[dict[str, Batch]]):
    """Micro-batches without end, as `{"batch": Batch}`; every `packs_per_step / micro_batch_packs` make a step."""

    def __init__(
        self, sources: Sources, planner: Planner, *, packs_per_step: int, micro_batch_packs: int, image_size: int
    ) -> None:
        self.sources = sources
        self.planner = planner
        self.packs_per_step = packs_per_step
        self.micro_batch_packs = micro_batch_packs
        self.image_size = image_size

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for window in self.planner.windows():
            for first in range(0, len(window), self.packs_per_step):
                yield from self._step(window[first : first + self.packs_per_step])

    def _step(self, packs: list[Pack]) -> Iterator[dict[str, Batch]]:
        train_on = self.sources.data.train_on
        placed = [[self.sources.place(item) for item in pack.items] for pack in packs]
        num_trained_tokens = self.planner.num_trained(packs)
        for first in range(0, len(placed), self.micro_batch_packs):
            batch = collate(
                placed[first : first + self.micro_batch_packs],
                lambda image: self.sources.pixels(image, self.image_size),
                train_on=train_on,
                pack_isolation=self.sources.data.pack_isolation,
                image_size=self.image_size,
                num_trained_tokens=num_trained_tokens,
            )
            yield {"batch": batch}
