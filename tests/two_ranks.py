"""One step of a toy, by one process or by one of several: `RANK=0 WORLD_SIZE=2 … python tests/two_ranks.py FOLDER`
makes the steps of FOLDER/work.pt one after another, and the first process writes FOLDER/found.pt."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import make_tiny_model
from transformers import PreTrainedTokenizerFast, TrainerCallback

from sft.core.distributed import ALONE, Rank, process_group
from sft.core.sample import Batch
from sft.models.idefics.weights import weights
from sft.recipe import TrainingConfig
from sft.training.loss_spikes import Spike, Spikes
from sft.training.trainer import Trainer, TrainerParts

Step = tuple[dict[str, torch.Tensor], dict[str, Any]]


class KeepGradients(TrainerCallback):
    """What the optimizer gets."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.requires_grad}


def step(
    folder: Path, tokenizer: Any, batches: Sequence[Batch], rank: Rank = ALONE, *, of_all: int, **options: Any
) -> Step:
    """Gradients and the line of metrics of a step over the micro-batches of a rank, of `of_all` on all ranks."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    model = make_tiny_model(tokenizer)
    weights.select_trainable(model)
    kept = KeepGradients(model)
    parts = TrainerParts(
        model=model,
        weights=weights,
        tokenizer=tokenizer,
        micro_batches=[{"batch": batch} for batch in batches],
        micro_batches_per_step=len(batches),
        settings=TrainingConfig(
            max_steps=1, tokens_per_step=1, learning_rate=1e-3, precision="float32", clip=1e9, **options
        ),
        checkpoint_every=1000,
        run_dir=folder,
        seed=0,
        source_names=["toy"],
        callbacks=[kept],
        rank=rank,
        micro_batches_of_all=of_all,
    )
    Trainer(parts).train()
    return kept.gradients, json.loads((folder / "metrics.jsonl").read_text()) if rank.is_main else {}


def main(folder: Path) -> None:
    """Every step is called a spike, so that it is seen who names which packs."""
    Spikes.add = lambda self, line: Spike(line["loss"], 0.0, 0.0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    with process_group() as rank:
        work = torch.load(folder / "work.pt", weights_only=False)
        found = {
            name: step(folder / name, tokenizer, of_ranks[rank.number], rank, **options)
            for name, (of_ranks, options) in work.items()
        }
        if rank.is_main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
