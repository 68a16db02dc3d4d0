"""What each of two processes does for test_distributed.py: several runs in one go, since starting is what takes time.

python two_processes.py ENGINE FOLDER RECIPE [TILED_RECIPE ...]
"""

import shutil
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from torch.optim.optimizer import register_optimizer_step_pre_hook
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
TILED = ("data.sequence_length=53", "training.tokens_per_step=159", "data.validation=null")
"""Five steps of three packs, each of one sample with an image or of two without."""
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


def every_weight_has_a_gradient(optimizer, args, kwargs) -> None:
    assert all(weight.grad is not None for group in optimizer.param_groups for weight in group["params"])


def main(engine: str, folder: Path, path: Path, *tiled: Path) -> None:
    """Full: without a break, those of tiles as well. Then, where the model is shared out, full with a break, of which a
    copy is kept, and LoRA with a break."""
    quiet_libraries()
    register_optimizer_step_pre_hook(every_weight_has_a_gradient)
    if engine == "zero3":
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, to go round gloo
    with process_group() as rank:
        trained(recipe_of(path, engine, folder / "whole", OPTIONS), rank)
        for recipe in tiled:
            trained(recipe_of(recipe, engine, folder / recipe.parent.name, TILED), rank)
        for name, options in (("broken", OPTIONS), ("lora", LORA)) if engine != "ddp" else ():
            recipe = recipe_of(path, engine, folder / name, options)
            checkpoint = stopped_after_a_step(recipe, rank)
            if rank.is_main:
                shutil.copytree(folder / name, folder / f"{name}-stopped")
            trained(recipe, rank, checkpoint)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
