"""What tests of training share: a recipe of four steps, a trainer of toys, and what they write."""

import json
from pathlib import Path

import yaml
from conftest import status_of
from transformers import TrainerCallback

from sft.models.idefics.weights import weights
from sft.recipe import Recipe, TrainingConfig
from sft.training.trainer import Trainer, TrainerParts

DATA = Path(__file__).parent.parent / "fixtures"


def write_recipe(folder: Path) -> Path:
    """Four steps over the fixtures in tests/fixtures, everything under `folder`."""
    values = {
        "model": {"path": "shipped:tiny_base"},
        "data": {
            "store": str(folder / "stores"),
            "sequence_length": 128,
            "max_skip_share": 0.0,
            "mixture": [
                {
                    "name": "pictures",
                    "share": 75,
                    "datasets": [
                        {"dataset": "easy_vqa", "path": str(DATA / "easy_vqa"), "options": {"form": form}}
                        for form in ("questions", "choices")
                    ],
                },
                {"name": "talk", "share": 25, "datasets": [{"dataset": "messages", "path": str(DATA / "messages")}]},
            ],
        },
        "training": {"max_steps": 4, "tokens_per_step": 256, "learning_rate": 1e-3, "precision": "float32"},
        "checkpoints": {"every_steps": 2},
        "output_dir": str(folder / "run"),
    }
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def metrics_of(recipe: Recipe) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]


def settings(**options) -> TrainingConfig:
    return TrainingConfig(
        **{"max_steps": 1, "tokens_per_step": 4, "learning_rate": 1e-3, "precision": "float32"} | options
    )


def trainer_of(model, template, batches, tmp_path, micro_batches_per_step, log=print, **options) -> Trainer:
    own = {name: options.pop(name) for name in ("write_checkpoint", "checkpoint_every") if name in options}
    parts = {
        "model": model,
        "tokenizer": template.tokenizer,
        "settings": settings(**options),
        "weights": weights,
        "seed": 0,
        "micro_batches": [{"batch": batch} for batch in batches],
        "micro_batches_per_step": micro_batches_per_step,
        "source_names": ["toy"],
        "run_dir": tmp_path,
        "checkpoint_every": 1000,
        "log": log,
    }
    return Trainer(TrainerParts(**parts | own))


class Watch(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, look) -> None:
        self.look = look

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.look()


def printed(capsys, *arguments: object) -> tuple[dict, str]:
    """The JSON object of a command that succeeds, and what it said beside it."""
    capsys.readouterr()
    assert status_of(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    return json.loads(out), err
