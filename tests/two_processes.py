"""What each of two processes does for test_distributed.py: several runs in one go, since starting is what takes time.

python two_processes.py ENGINE RECIPE FOLDER
"""

import shutil
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sft.cli.terminal import quiet_libraries
from sft.core.distributed import Rank, barrier, process_group
from sft.data.prepare import open_prepared
from sft.recipe import Recipe, load_recipe
from sft.runs.status import RunStatus
from sft.training import run

OPTIONS = (
    "training.tokens_per_step=640", "data.mixture.0.share=50", "data.mixture.1.share=50", "training.max_steps=3",
    "data.mixture.1.datasets.0.path=shipped:recipes/quickstart_conversations.jsonl", "checkpoints.every_steps=3",
)  # fmt: skip
"""Steps of five packs, some of them without images."""
LORA = (
    *OPTIONS, "model.mode=lora", "training.gradient_checkpointing=true", "data.validation.share=0.2",
    "training.max_steps=2", "checkpoints.every_steps=2",
)  # fmt: skip


def recipe_of(path: Path, engine: str, run_dir: Path, options: tuple[str, ...]) -> Recipe:
    return load_recipe(path, (*options, f"output_dir={run_dir}", f"distributed.engine={engine}"))


def trained(recipe: Recipe, rank: Rank, resume_from: Path | None = None) -> RunStatus:
    try:
        return run.train(recipe, open_prepared(recipe)[0], resume_from=resume_from, rank=rank)
    finally:  # DeepSpeed's settings are the process's: the next model would be shared out while it is loaded
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()


def stopped_after_a_step(recipe: Recipe, rank: Rank) -> Path:
    """The checkpoint to go on from."""
    run_dir = Path(recipe.output_dir)
    if rank.is_main:
        run_dir.mkdir()
        (run_dir / "stop").touch()
    barrier()
    assert trained(recipe, rank).status == "stopped"
    return run_dir / "checkpoints" / "checkpoint-1"


def main(engine: str, path: Path, folder: Path) -> None:
    """Full: without a break, and with one, of which a copy is kept. LoRA: with a break."""
    quiet_libraries()
    if engine == "zero3":
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, to go round gloo
    with process_group() as rank:
        trained(recipe_of(path, engine, folder / "whole", OPTIONS), rank)
        for name, options in (("broken", OPTIONS), ("lora", LORA)):
            recipe = recipe_of(path, engine, folder / name, options)
            checkpoint = stopped_after_a_step(recipe, rank)
            if rank.is_main:
                shutil.copytree(folder / name, folder / f"{name}-stopped")
            trained(recipe, rank, checkpoint)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
