"""The training loop, and a whole run of four steps from raw files to checkpoints that plain transformers opens."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import batch_of, conversation, document, make_tiny_model, place, square_images, toy_images
from helpers.training import Watch, metrics_of, trainer_of, write_recipe
from safetensors.torch import load_file
from transformers import AutoTokenizer, IdeficsForVisionText2Text

from sft.batches.collate import collate
from sft.batches.data_loader import MicroBatches
from sft.batches.mixture_report import mix
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.checks.environment import LIBRARIES
from sft.core.errors import RunError, UserError
from sft.core.sample import SkipSample
from sft.data.prepare import open_sources, prepare
from sft.models.base_model import base_path, prepare_base
from sft.models.idefics.family import FAMILY
from sft.models.idefics.text import load_tokenizer
from sft.models.idefics.weights import EXTRA_EMBEDDING, EXTRA_HEAD, weights
from sft.models.loaded_model import load_for_inference
from sft.models.lora import add_adapters
from sft.recipe import LoraSettings, Recipe, load_recipe
from sft.runs.checkpoint import broken_files, checkpoints, is_complete, step_of, write_folder
from sft.training import run, write_metrics

# --------------------------------------------------------------------------------------------------------- the loop

SAMPLES = (
    conversation(("<dog>", "What is it?"), "A dog."),
    conversation("Hi.", "Hello.", system="A dog and a cat."),
    document("A fox.", "<fox>", "The quick brown fox."),
    conversation(("<cat>", "A cat.", "<dog>", "And this?"), "A dog.", "Sure?", "Yes."),
)


def step_once(template, tmp_path, batches, **options) -> tuple[dict[str, torch.Tensor], dict]:
    """Parameters after one optimizer step over `batches`, and its line of metrics."""
    model = make_tiny_model(template.tokenizer)
    weights.select_trainable(model)
    trainer_of(model, template, batches, tmp_path, len(batches), **options).train()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return dict(model.named_parameters()), json.loads(line)


KEY_BIASES = ("k_proj.bias", "k_layer_norm.bias")
"""A bias on all keys moves all scores of a query alike: its gradient is zero but for rounding."""


def test_a_step_whose_samples_are_all_dirty_trains_nothing_and_says_so(template, tmp_path):
    def fails(image):
        raise SkipSample("image does not decode")

    placed = [place(template, SAMPLES[0])]
    batch = collate([placed], toy_images(fails), train_on="all", num_trained_tokens=9, forgive_images=True)
    _, line = step_once(template, tmp_path, [batch])
    assert (line["dirty_samples"], line["trained_tokens"], line["loss"], line["grad_norm"]) == (1, 0, 0, 0)


def test_four_micro_batches_make_the_step_of_one(template, tmp_path):
    packs = [[place(template, sample)] for sample in SAMPLES]
    whole = batch_of(*packs)
    parts = [batch_of(pack, num_trained_tokens=whole.num_trained_tokens) for pack in packs]
    (found, line), (expected, whole_line) = step_once(template, tmp_path, parts), step_once(template, tmp_path, [whole])
    before = dict(make_tiny_model(template.tokenizer).named_parameters())
    largest = 0.0
    for name, parameter in expected.items():
        # AdamW's first step is ± the learning rate, 1e-3, whatever the gradient: rounding shows where that is tiny.
        difference = (found[name] - parameter).abs()
        assert difference.max() < 1e-5, name
        assert name.endswith(KEY_BIASES) or (difference > 1e-6).float().mean() < 0.001, name
        largest = max(largest, (before[name] - parameter).abs().max().item())
    assert largest > 1e-3, "something was trained"
    for name in ("loss", "grad_norm", "trained_tokens"):  # AdamW's first step does not see the gradient's scale
        assert line[name] == pytest.approx(whole_line[name], rel=1e-5)
    assert line["sources"]["toy"]["trained_tokens"] == whole.num_trained_tokens


def gradient_norm(template, packs, **options) -> float:
    """Of the mean over all tokens, or what `loss` makes of (model, packs)."""
    model = make_tiny_model(template.tokenizer)
    weights.select_trainable(model)
    options["loss"](model.train(), packs).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def test_the_mean_of_micro_batch_means_is_that_of_2023(template, tmp_path):
    """Cross entropy averaged over each micro-batch, then over micro-batches."""
    packs = [[place(template, sample)] for sample in SAMPLES]
    batches = [batch_of(pack, num_trained_tokens=12345) for pack in packs]

    def mean_of_means(model, packs):
        return torch.stack([model(batch=batch_of(pack)).loss for pack in packs]).mean()

    def token_mean(model, packs):
        return model(batch=batch_of(*packs)).loss

    expected = gradient_norm(template, packs, loss=mean_of_means)
    assert abs(expected - gradient_norm(template, packs, loss=token_mean)) > 1e-3, "the two differ"
    _, line = step_once(template, tmp_path, batches, normalisation="micro_batch_mean")
    assert line["grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_z_loss_pulls_the_softmax_denominator_to_one(template, tmp_path):
    """m4: weight * sum(log Z ** 2) / tokens, beside the cross entropy; the loss that is shown stays without it."""
    packs = [[place(template, sample)] for sample in SAMPLES]
    batch = batch_of(*packs)

    def by_hand(model, packs):
        logits = model(batch=batch, read_P=torch.arange(len(batch.labels_T) - 1))
        trained = batch.labels_T[1:] != -100
        log_z = torch.log(torch.exp(logits).sum(-1))
        cross_entropy = log_z - logits.gather(-1, batch.labels_T[1:, None].clamp(min=0))[:, 0]
        return ((cross_entropy + 0.1 * log_z**2) * trained).sum() / trained.sum()

    expected = gradient_norm(template, packs, loss=by_hand)
    _, without = step_once(template, tmp_path, [batch])
    _, line = step_once(template, tmp_path, [batch], z_loss=0.1)
    assert line["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - without["grad_norm"]) > 1e-3
    assert line["loss"] == without["loss"]


# -------------------------------------------------------------------------------------------------------- gradients


def test_a_trainable_tensor_without_gradient_stops_the_first_step_with_images(template, tmp_path, model):
    """The norm behind the tower, were it not frozen by name."""
    weights.select_trainable(model)
    model.model.vision_model.post_layernorm.requires_grad_(True)
    batches = [batch_of([place(template, SAMPLES[1])]), batch_of([place(template, SAMPLES[0])])]
    trainer = trainer_of(model, template, batches, tmp_path, 1, max_steps=2)
    with pytest.raises(RunError, match=r"step 2: 2 of 14\d trainable tensors got no gradient, .*post_layernorm.weight"):
        trainer.train()


def adapted(model, *targets) -> torch.nn.Module:
    add_adapters(model, weights.lora_pattern(targets), LoraSettings(r=4, targets=targets), "base")
    weights.select_trainable(model, ["extra_rows"])
    return model


def test_adapters_that_do_not_move_stop_the_first_step(template, tmp_path, model):
    """DeepSpeed was seen to leave B at zero (peft#1402)."""
    batch = batch_of([place(template, SAMPLES[0])])
    trainer = trainer_of(adapted(model, "language"), template, [batch], tmp_path, 1)
    forgotten = model.model.layers[3].mlp.up_proj.lora_B.default.weight
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not forgotten]
    with pytest.raises(
        RunError, match=r"step 1: 1 adapters have a gradient but did not move, .*layers\.3\.mlp\.up_proj"
    ):
        trainer.train()


@pytest.mark.parametrize("checkpointing", [False, True, 0.5])
def test_all_of_what_is_asked_for_moves_and_nothing_else(template, tmp_path, model, checkpointing):
    """Reentrant checkpointing would leave out the adapters of the tower."""
    before = {name: p.clone() for name, p in adapted(model, "vision", "language").named_parameters()}
    batch = batch_of([place(template, SAMPLES[0])])
    trainer_of(model, template, [batch], tmp_path, 1, gradient_checkpointing=checkpointing).train()
    expected = {False: [False] * 4, True: [True] * 4, 0.5: [True, False, True, False]}
    assert [layer.gradient_checkpointing for layer in model.model.layers] == expected[checkpointing]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {EXTRA_EMBEDDING, EXTRA_HEAD} | {n for n in before if "lora_" in n}


def test_what_is_trained_beside_4_bits_stays_exact(template, tmp_path, model):
    """SFTTrainer rounds it to bfloat16."""
    weights.save_model(model, tmp_path / "base", torch.float32)
    quantised = adapted(weights.load_model(tmp_path / "base", trained=["extra_rows"], quantised=True), "language")
    before = {name: p.clone() for name, p in quantised.named_parameters() if p.requires_grad}
    trainer_of(quantised, template, [batch_of([place(template, SAMPLES[0])])], tmp_path, 1)
    for name, parameter in before.items():
        assert quantised.get_parameter(name).dtype == torch.float32
        assert torch.equal(quantised.get_parameter(name), parameter)


def test_a_float16_step_that_overflows_is_left_out_and_the_run_goes_on(template, tmp_path, model, monkeypatch):
    """The gradient scaler as a GPU without bfloat16 has it, here on the CPU; its first scale is far too large."""
    weights.select_trainable(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches = [batch_of([place(template, SAMPLES[0])]) for _ in range(3)]
    trainer = trainer_of(model, template, batches, tmp_path, 1, max_steps=3)
    trainer.precision, accelerator = "float16", trainer.accelerator
    monkeypatch.setattr(
        accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-120)
    )
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setitem(accelerator.state._shared_state, "_mixed_precision", "fp16")
    seen = []
    trainer.add_callback(
        Watch(lambda: seen.append(all(torch.equal(p, before[n]) for n, p in model.named_parameters())))
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] is None for line in lines] == [True, False, False]
    assert seen == [True, False, False]
    assert lines[0]["loss"] == lines[1]["loss"] > lines[2]["loss"]


def test_a_loss_that_is_no_number_stops_the_run(template, tmp_path, model, monkeypatch):
    monkeypatch.setattr(write_metrics, "MAX_NONFINITE_STEPS", 1)
    weights.select_trainable(model)
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    batch = batch_of([place(template, SAMPLES[0])])
    trainer = trainer_of(model, template, [batch], tmp_path, 1)
    with pytest.raises(RunError, match=r"step 1: loss nan.*not finite"):
        trainer.train()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] is line["grad_norm"] is None, "the line that shows it is written, as JSON"


def test_a_loss_that_is_no_number_leaves_its_step_out_though_the_gradient_is_finite(template, tmp_path, model):
    weights.select_trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, template, [batch_of([place(template, SAMPLES[0])])], tmp_path, 1)
    add = trainer.step_metrics.add
    trainer.step_metrics.add = lambda batch, losses_P, sources_P: add(batch, losses_P * math.nan, sources_P)
    trainer.train()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["loss"] is None and line["grad_norm"] > 0 and trainer.nonfinite_steps == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_writing_a_checkpoint_is_no_part_of_the_next_steps_speed(template, tmp_path, model, monkeypatch):
    """By a clock on which only that takes time, an hour."""
    weights.select_trainable(model)
    now = itertools.count()
    saving = []
    clock = SimpleNamespace(time=lambda: 0.0, perf_counter=lambda: next(now) + 3600 * len(saving))
    monkeypatch.setattr("sft.training.write_metrics.time", clock)
    batches = [batch_of([place(template, SAMPLES[0])]) for _ in range(2)]
    options = {"checkpoint_every": 1, "write_checkpoint": lambda: saving.append(True)}
    trainer = trainer_of(model, template, batches, tmp_path, 1, max_steps=2, **options)
    trainer.train()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert len(saving) == 2 and first["tokens_per_second"] == second["tokens_per_second"]


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_is_there_only_when_it_is_complete(tmp_path):
    def breaks(folder):
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "checkpoint-1", breaks)
    assert not (tmp_path / "checkpoint-1").exists()
    assert checkpoints(tmp_path) == []
    write_folder(tmp_path / "checkpoint-1", lambda folder: (folder / "weights").write_text("whole"))
    assert (tmp_path / "checkpoint-1" / "weights").read_text() == "whole"
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    assert not list(tmp_path.glob(".*")), "the staging folder became the checkpoint"


def test_a_broken_checkpoint_is_noticed(tmp_path):
    for step in (10, 9, 100):
        write_folder(tmp_path / f"checkpoint-{step}", lambda folder: (folder / "weights").write_bytes(b"abc"))
    assert [step_of(path) for path in checkpoints(tmp_path)] == [9, 10, 100]
    assert broken_files(tmp_path / "checkpoint-9") == []
    (tmp_path / "checkpoint-9" / "weights").write_bytes(b"abd")
    assert broken_files(tmp_path / "checkpoint-9") == ["weights"]
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"ab")
    assert not is_complete(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-100" / "weights").unlink()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [9]
    with pytest.raises(UserError, match="expected a name like checkpoint-100"):
        step_of(tmp_path / "weights")


# ---------------------------------------------------------------------------------------------------- the whole way


TOKEN = "hf_" + "0123456789" * 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Recipe:
    """A recipe that was prepared and trained, with a token in the environment and without a network."""
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("whole")))

    def refuse(*address, **options):
        raise AssertionError(f"the network was asked for {address}")

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_TOKEN", TOKEN)
        for name in ("getaddrinfo", "create_connection", "socket.connect"):
            patched.setattr(f"socket.{name}", refuse)
        run.train(recipe, prepare(recipe))
    return recipe


def test_no_token_is_in_what_a_run_writes(finished):
    files = [file for file in Path(finished.output_dir).rglob("*") if file.is_file()]
    assert len(files) > 10 and not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_a_run_says_that_it_is_finished(finished):
    values = json.loads((Path(finished.output_dir) / "run.json").read_text())
    assert (values["status"], values["step"], values["max_steps"]) == ("finished", 4, 4)
    assert values["why"] == "training.max_steps"
    assert values["tokens"] == sum(line["tokens"] for line in metrics_of(finished))
    assert values["precision"] == "float32"
    assert values["versions"].keys() == set(LIBRARIES)
    assert load_recipe(Path(finished.output_dir) / "recipe.yaml") == finished


def test_metrics_have_a_line_a_step(finished):
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line.keys() == {
            "step", "time", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "tokens_per_second",
            "data_wait", "peak_memory_bytes", "sources", "dirty_samples",
        }  # fmt: skip
        assert line["sources"].keys() == {"pictures", "talk"}
        assert sum(own["tokens"] for own in line["sources"].values()) == line["tokens"] <= 256
        assert sum(own["trained_tokens"] for own in line["sources"].values()) == line["trained_tokens"]
        assert all(own.keys() == {"loss", "tokens", "trained_tokens"} for own in line["sources"].values())


def test_training_lowers_the_loss_on_what_was_trained(finished):
    sources = prepare(finished)
    planner = Planner(sources.sources, finished.data, packs_per_step=2, seed=finished.seed)
    steps = MicroBatches(Plans(sources, planner, micro_batch_packs=2), square_images(64))
    first_step = next(iter(steps))["batch"]
    folders = base_path(finished), Path(finished.output_dir) / "checkpoints" / "checkpoint-4"
    before, after = (float(weights.load_model(folder)(batch=first_step).loss.detach()) for folder in folders)
    assert after < 0.9 * before


def test_the_mixture_that_was_shown_is_the_one_that_was_trained(finished):
    report = mix(finished, prepare(finished).sources)
    lines = metrics_of(finished)
    for source in report["sources"]:
        assert source["tokens"] == sum(line["sources"][source["name"]]["tokens"] for line in lines)
        assert source["trained_tokens"] == sum(line["sources"][source["name"]]["trained_tokens"] for line in lines)


def test_checkpoints_open_in_plain_transformers(finished):
    found = checkpoints(Path(finished.output_dir) / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-4"]
    for path in found:
        assert broken_files(path) == []
        assert json.loads((path / "config.json").read_text())["architectures"] == ["IdeficsForVisionText2Text"]
    plain = IdeficsForVisionText2Text.from_pretrained(found[-1])
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(found[-1])
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<s>User:<fake_token_around_image><image><fake_token_around_image>What is this?<end_of_utterance>\n"
        "Assistant: A dog.<end_of_utterance></s>"
    )
    own = load_tokenizer(found[-1])
    text = "User: Is it a blue circle?"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]


def test_frozen_groups_are_written_as_they_were(finished, tmp_path):
    overrides = (
        "model.trainable=[head,gates]", "training.groups.gates.learning_rate=0.1",
        "training.precision=bfloat16", "training.max_steps=1",
    )  # fmt: skip
    recipe = load_recipe(Path(finished.output_dir) / "recipe.yaml", (f"output_dir={tmp_path / 'run'}", *overrides))
    run.train(recipe, prepare(recipe))
    before = load_file(base_path(recipe) / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors")
    changed = {name for name in before if not torch.equal(after[name], before[name].to(torch.bfloat16))}
    assert {weights.group_of(name) for name in changed} == {"head", "gates"}


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_adapters_are_trained_written_and_loaded_with_their_base(finished, tmp_path, mode):
    overrides = ("model.lora.r=4", "model.trainable=[gates]", "training.optimizer=adamw_8bit", "training.max_steps=2")
    recipe = load_recipe(
        Path(finished.output_dir) / "recipe.yaml",
        (f"output_dir={tmp_path / 'run'}", f"model.mode={mode}", *overrides),
    )
    said = []
    run.train(recipe, prepare(recipe), log=said.append)
    assert [line.split()[0] for line in said[0].splitlines()[1:]] == [
        "extra_rows", "language", "gates", "cross_attention", "all",
    ]  # fmt: skip
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert is_complete(folder)
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "recipe.yaml"} <= {
        file.name for file in folder.iterdir()
    }
    assert not (folder / "config.json").exists(), "transformers would look for a model beside it"
    base, loaded = weights.load_model(base_path(recipe)), load_for_inference(folder, precision="float32")
    batch = batch_of([place(loaded.template, document("A fox."))])
    assert not torch.equal(loaded.model(batch=batch).logits_PV, base.eval()(batch=batch).logits_PV)

    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/moved"}))
    again = load_for_inference(folder, precision="float32", load_in_4bit=mode == "qlora")
    apart = (loaded.model(batch=batch).logits_PV - again.model(batch=batch).logits_PV).abs().max()
    assert (apart > 0) == (mode == "qlora"), "the base was found through the recipe"
    (folder / "recipe.yaml").unlink()
    with pytest.raises(UserError, match="its base model /moved is not here; write its folder or hub id"):
        load_for_inference(folder)


def test_the_same_recipe_gives_the_same_weights(finished, tmp_path):
    recipe = load_recipe(Path(finished.output_dir) / "recipe.yaml", (f"output_dir={tmp_path / 'again'}",))
    run.train(recipe, prepare(recipe))
    first, second = (
        Path(one.output_dir) / "checkpoints" / "checkpoint-4" / "model.safetensors" for one in (finished, recipe)
    )
    assert first.read_bytes() == second.read_bytes()
    assert [line["loss"] for line in metrics_of(recipe)] == [line["loss"] for line in metrics_of(finished)]


def test_a_run_that_fails_says_so(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(write_metrics, "MAX_NONFINITE_STEPS", 1)
    recipe = load_recipe(
        Path(finished.output_dir) / "recipe.yaml",
        (f"output_dir={tmp_path}", "training.learning_rate=1e30"),
    )
    with pytest.raises(RunError, match="not finite"):
        run.train(recipe, prepare(recipe))
    values = json.loads((tmp_path / "run.json").read_text())
    assert values["status"] == "failed" and values["why"].startswith("step 2: loss nan")
    assert checkpoints(tmp_path / "checkpoints") == []


def test_a_run_that_is_interrupted_says_so(finished, tmp_path):
    recipe = load_recipe(Path(finished.output_dir) / "recipe.yaml", (f"output_dir={tmp_path}",))

    def interrupt(step, line):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(recipe, prepare(recipe), interrupt)
    values = json.loads((tmp_path / "run.json").read_text())
    assert (values["status"], values["step"], values["why"]) == ("stopped", 3, "interrupted")
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["checkpoint-2"]


def test_what_is_not_encoded_for_the_model_names_the_command(finished, tmp_path):
    shutil.copytree(finished.data.store, tmp_path / "stores")
    recipe = load_recipe(Path(finished.output_dir) / "recipe.yaml", (f"data.store={tmp_path / 'stores'}",))
    sources = prepare(recipe)
    shutil.rmtree(sources.parts[0][0].encoded.path)
    from sft.models.loaded_model import load_template

    template = load_template(FAMILY, prepare_base(recipe))
    with pytest.raises(UserError, match=r"not encoded for this model.*run `idefics-sft prepare` first"):
        open_sources(recipe, template)
