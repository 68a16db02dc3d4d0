"""What a score measures and how it is printed: the same record in tasks, in selection.json and on the page."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What the score of a benchmark is."""

    name: str  # with the variant, where there are several: `VQA accuracy (m4)`
    is_share: bool = True  # whether it is a fraction of 1, printed in percent, with intervals between 0 and 1
    lower_is_better: bool = False
    unit: str = ""  # printed after a number that is not a share

    @property
    def sign(self) -> int:
        """What a score is multiplied by so that higher is better."""
        return -1 if self.lower_is_better else 1


ACCURACY = Metric(name="accuracy")
LOSS = Metric(name="held-out loss", is_share=False, lower_is_better=True, unit="nats")
