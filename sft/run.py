"""A run from a recipe: the one place that knows all parts.

prepare  raw files -> stores and encoded arrays, the base model with its full vocabulary
train    model + sources + trainer -> RUN/ with checkpoints
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.chat_template import ChatTemplate
from sft.checkpoint import checkpoint_name, write_folder
from sft.data_loader import MicroBatches, Part, Planner, Sources
from sft.datasets import Adapter
from sft.encoding import EncodedSamples, encode_samples, fingerprint
from sft.errors import UserError
from sft.inference import load_template
from sft.models import ModelFamily, get_family
from sft.recipe import Recipe
from sft.run_status import RunStatus
from sft.shipped import resolve
from sft.store import Store, prepare_store
from sft.validation import check_adapters, is_local

if TYPE_CHECKING:
    import torch

SNAPSHOT_DTYPE = "bfloat16"
"""Weight snapshots are rounded once to this: what is evaluated is what is shipped."""


# ------------------------------------------------------------------------------------------------------ prepare


def base_path(recipe: Recipe) -> Path:
    """Where the prepared base of a recipe stands; another place when the files of a local base change."""
    files = sorted(resolve(recipe.model.path).glob("*")) if is_local(recipe.model.path) else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(f"{recipe.model.path} {stamps}".encode()).hexdigest()[:8]
    name = recipe.model.path.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return Path(recipe.data.store) / "bases" / f"{name}-{digest}"


def prepare_base(recipe: Recipe) -> Path:
    """The base model with every special token, made on first use."""
    path = base_path(recipe)
    if not (path / "config.json").is_file():
        source = resolve(recipe.model.path) if is_local(recipe.model.path) else recipe.model.path
        path.parent.mkdir(parents=True, exist_ok=True)
        get_family(recipe.model.family).prepare_base(source, path)
    return path


def prepare(recipe: Recipe, on_progress: Callable[[str, int], None] = lambda name, records: None) -> Sources:
    """Make whatever is missing of stores, base and encoded arrays; return the sources, ready to be mixed.

    `on_progress` is called with a source's name and the number of records read so far.
    """
    check_adapters(recipe)
    template = load_template(get_family(recipe.model.family), prepare_base(recipe))
    parts: list[list[Part]] = []
    for source in recipe.data.mixture:
        own = []
        for dataset in source.datasets:
            store = prepare_store(
                Adapter(dataset.dataset, dataset.path, dataset.split, dataset.options),
                Path(recipe.data.store) / dataset.store_name,
                asked=dataset.model_dump(),
                max_skip_share=recipe.data.max_skip_share,
                on_progress=lambda records, name=source.name: on_progress(name, records),  # type: ignore[misc]
            )
            encoded = encode_samples(store.stored_samples(), template, encoded_path(store, template))
            own.append(Part(store, encoded))
        parts.append(own)
    return Sources(parts, recipe.data)


def open_sources(recipe: Recipe, template: ChatTemplate) -> Sources:
    """The prepared sources of a recipe.

    Raises:
        UserError: something is not prepared; the message names the command.
    """
    parts = []
    for source in recipe.data.mixture:
        own = []
        for dataset in source.datasets:
            store = Store(Path(recipe.data.store) / dataset.store_name)
            path = encoded_path(store, template)
            if not (path / "index.json").is_file():
                raise UserError(f"{store.path}: not encoded for this model; run `idefics-sft prepare` first")
            own.append(Part(store, EncodedSamples(path)))
        parts.append(own)
    return Sources(parts, recipe.data)


def encoded_path(store: Store, template: ChatTemplate) -> Path:
    """Where a store keeps what a template encodes."""
    return store.path / "encoded" / fingerprint(template)


# -------------------------------------------------------------------------------------------------------- train


def train(
    recipe: Recipe,
    sources: Sources,
    on_step: Callable[[int, dict[str, Any]], None] = lambda step, line: None,
    say: Callable[[str], None] = lambda line: None,
) -> RunStatus:
    """Fine-tune as the recipe says, into its output_dir; what an earlier run left there goes first.

    `on_step` gets every line of metrics.jsonl as it is written, `say` what a person should know before the first.
    """
    from transformers import set_seed

    from sft.trainer import Trainer

    run_dir = Path(recipe.output_dir)
    _clear(run_dir)
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    family = get_family(recipe.model.family)
    base = prepare_base(recipe)
    set_seed(recipe.seed)
    model = family.load_model(base)
    frozen = family.select_trainable(model)
    say(_what_is_trained(model, frozen))
    template = load_template(family, base)
    planner = Planner(sources.sizes(), recipe.data, packs_per_step=recipe.packs_per_step, seed=recipe.seed)
    micro_batches = MicroBatches(
        sources,
        planner,
        packs_per_step=recipe.packs_per_step,
        micro_batch_packs=recipe.training.micro_batch_packs,
        image_size=family.image_size(model),
    )

    def write_checkpoint(trained: torch.nn.Module, step: int) -> None:
        path = run_dir / "checkpoints" / checkpoint_name(step)
        write_folder(path, lambda folder: save_snapshot(family, trained, template, recipe, folder))

    tokens = 0

    def count(step: int, line: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += line["tokens"]
        on_step(step, line)

    trainer = Trainer(
        model,
        tokenizer=template.tokenizer,
        micro_batches=micro_batches,
        micro_batches_per_step=recipe.packs_per_step // recipe.training.micro_batch_packs,
        settings=recipe.training,
        checkpoint_every=recipe.checkpoints.every_steps,
        write_checkpoint=write_checkpoint,
        run_dir=run_dir,
        seed=recipe.seed,
        source_names=[source.name for source in recipe.data.mixture],
        on_step=count,
    )
    started, cpu_started = time.perf_counter(), time.process_time()

    def status(state: str) -> RunStatus:
        return RunStatus(
            status=state,
            step=int(trainer.state.global_step),
            max_steps=recipe.training.max_steps,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - cpu_started,
            tokens=tokens,
            precision=trainer.precision,
        )

    with _recorded(run_dir, status):
        trainer.train()
    model.eval()
    return status("finished")


def _what_is_trained(model: torch.nn.Module, frozen: tuple[str, ...]) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    line = f"training {trained:,} parameters"
    return f"{line}; frozen, since no gradient ever reaches them: {', '.join(frozen)}" if frozen else line


def _clear(run_dir: Path) -> None:
    """Remove what an earlier run wrote, so that no step of it is taken for one of this run. Stores stay."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoints", "evaluations"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("run.json", "selection.json", "metrics.jsonl"):
        (run_dir / name).unlink(missing_ok=True)


@contextmanager
def _recorded(run_dir: Path, status: Callable[[str], RunStatus]) -> Iterator[None]:
    """Keep run.json true: running, then finished, stopped or failed."""

    def write(state: str) -> None:
        values = vars(status(state)) | {"versions": _versions()}
        (run_dir / "run.json").write_text(json.dumps(values, indent=2) + "\n")

    write("running")
    try:
        yield
    except BaseException as error:
        write("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    write("finished")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")}


def save_snapshot(
    family: ModelFamily, model: torch.nn.Module, template: ChatTemplate, recipe: Recipe, folder: Path
) -> None:
    """Weights, config, tokenizer, chat template and recipe: a plain transformers folder."""
    import torch

    family.save_model(model, folder, getattr(torch, SNAPSHOT_DTYPE))
    template.tokenizer.chat_template = template.template
    template.tokenizer.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
