"""Sources whose sizes are written out, for planning without any data."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from hypothesis import strategies as st

from sft.data.orders import ImageGroups, ShownImages
from sft.recipe import DataConfig


@dataclass
class Toy:
    """A source of samples of these lengths, which show these images; half of each is trained."""

    share: float
    lengths: list[int]
    shown: list[tuple[int, ...]] | None = None
    name: str = "toy"
    max_epochs: float | None = None
    when_exhausted: str = "stop"

    def __len__(self):
        return len(self.lengths)

    def num_tokens(self, rows):
        return np.array(self.lengths)[rows]

    def num_trained(self, rows):
        return self.num_tokens(rows) // 2

    def images(self, rows):
        shown = [sorted(set(self.images_of(row))) for row in rows]
        keys = np.array([*chain.from_iterable(shown)], dtype=np.int64)
        return ShownImages(keys, np.ones_like(keys), np.array([*map(len, shown)], dtype=np.int64))

    def images_of(self, row):
        return () if self.shown is None else self.shown[row]

    @property
    def groups(self):
        names = [frozenset(self.images_of(row)) or row for row in range(len(self))]
        by_name = {name: [row for row, other in enumerate(names) if other == name] for name in names}
        starts = np.cumsum([0, *map(len, by_name.values())])
        return ImageGroups(np.array([*chain.from_iterable(by_name.values())]), starts) if self.shown else None


def data_config(*names, **options):
    """Data settings for sources of equal share; the planner reads shares from the sizes it is given."""
    names = names or ("toy",)
    mixture = [{"name": name, "share": 1 / len(names), "datasets": [{"dataset": "toys"}]} for name in names]
    return DataConfig(mixture=mixture, **{"sequence_length": 64} | options)


@st.composite
def mixtures(draw, longest=40):
    """One to four sources; some samples have images, which sources share."""
    shares = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    sizes = []
    for share in shares:
        lengths = draw(st.lists(st.integers(4, longest), min_size=1, max_size=8))
        images = [tuple(draw(st.lists(st.integers(0, 3), max_size=2))) for _ in lengths]
        sizes.append(Toy(share / sum(shares), lengths, images, name=f"source {len(sizes)}"))
    return sizes
