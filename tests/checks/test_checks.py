"""A sound model passes all checks, each defect fails the check that is there for it, and training stops for it."""

import json
import re
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from conftest import REPOSITORY, make_tiny_model, status_of
from helpers.golden_ids import A_DOG, CHAT_IDS
from helpers.training import write_recipe
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.checks import before_training, environment, model
from sft.checks.finding import raise_failed
from sft.checks.model import check_model, check_tokens
from sft.checks.subject import Subject
from sft.core.errors import RunError, UserError
from sft.core.shipped import resolve
from sft.data.prepare import prepare
from sft.models import grouped_attention, packed_model
from sft.models.base_model import prepare_base
from sft.models.chat_template import ChatTemplate
from sft.models.idefics import text as idefics_text
from sft.models.idefics.family import FAMILY
from sft.models.idefics.text import golden_ids
from sft.models.idefics.weights import weights
from sft.models.loaded_model import load_template
from sft.recipe import load_recipe
from sft.runs.checkpoint import write_folder
from sft.training.dry_run import batch_of_caps, costliest
from sft.training.open_model import load_for_training

CHECKS = ("token ids", "weights", "gates", "image changes logits", "loss", "gradients of the extra rows")


@pytest.fixture
def subject(tokenizer, template) -> Subject:
    return Subject(FAMILY, make_tiny_model(tokenizer), template, "float32")


def results(subject: Subject) -> dict[str, str]:
    return {finding.name: finding.result for finding in check_model(subject)}


def others_than(found: dict[str, str], result: str) -> dict[str, str]:
    return {name: other for name, other in found.items() if other != result}


# --------------------------------------------------------------------------------------------------------- a model


def test_a_sound_model_passes_every_check_and_is_left_as_it_was(subject):
    before = {name: (p.clone(), p.requires_grad) for name, p in subject.model.named_parameters()}
    assert results(subject) == dict.fromkeys((*CHECKS, "grouped attention"), "ok")
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1] and parameter.grad is None
    assert subject.model.config._attn_implementation == "grouped"


def set_to(value: float, part: str):
    def change(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.data.view(-1)[0 if value != 0 else slice(None)] = value

    return change


def detach_extra_head(model: torch.nn.Module) -> None:
    model.lm_head.additional_fc.register_forward_hook(lambda module, inputs, output: output.detach())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_to(0.0, ".alpha_"), {"gates": "warning", "image changes logits": "skipped"}),
        (set_to(0.0, "cross_attn.o_proj"), {"image changes logits": "failed"}),
        (set_to(float("nan"), "layers.1.mlp.up_proj"), {"weights": "failed"}),
        (set_to(float("inf"), "embed_tokens.weight"), {"weights": "failed"}),
        (detach_extra_head, {"gradients of the extra rows": "failed"}),
    ],
    ids=["gates are zero", "blind", "NaN", "an infinite row that no check reads", "no gradient"],
)
def test_a_defect_of_the_model_fails_its_check(subject, change, expected):
    change(subject.model)
    found = others_than(results(subject), "ok")
    assert expected.items() <= found.items()
    assert list(found.values()).count("failed") == list(expected.values()).count("failed")


def test_a_loss_without_the_extra_vocabulary_is_found(subject, monkeypatch):
    """As a fused head computes it that reads `lm_head.weight` alone (TRL 1.16 on this model)."""
    whole = packed_model.token_losses

    def base_only(logits_PV, targets_P):
        base_PV = logits_PV[:, : subject.model.config.vocab_size]
        return whole(base_PV, targets_P.clamp(max=base_PV.shape[1] - 1))

    monkeypatch.setattr(packed_model, "token_losses", base_only)
    assert others_than(results(subject), "ok") == {"loss": "failed", "gradients of the extra rows": "failed"}
    assert model.check_loss(subject, by_own_logits=True).result == "failed"


def test_samples_that_see_each_other_are_found(subject, monkeypatch):
    monkeypatch.setattr(packed_model, "group_tokens", lambda ids_T: grouped_attention.group_tokens(ids_T.clamp(max=0)))
    assert results(subject)["grouped attention"] == "failed"


def test_golden_ids_are_those_that_the_golden_test_knows():
    assert golden_ids(SimpleNamespace(vocab_size=32000)) == [*CHAT_IDS, *A_DOG, 2]
    assert golden_ids(SimpleNamespace(vocab_size=400)) is None


def test_ids_that_differ_from_the_golden_ones_are_shown(subject, monkeypatch):
    monkeypatch.setattr(idefics_text, "golden_ids", lambda config: [*CHAT_IDS, *A_DOG, 2])
    finding = check_tokens(subject)
    assert finding.result == "failed" and "at 1 of a chat, idefics-9b-instruct was trained with [4911, 29901" in (
        finding.found
    )
    with pytest.raises(UserError, match="token ids: "):
        raise_failed([finding])


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('"prepend":"▁"', '"prepend":"x"', "text after a special token begins with 'x"),
        ('[{"type":"Prepend"', '[{"type":"Lowercase"},{"type":"Prepend"', "a chat comes back with 'user:<fake_token"),
    ],
)
def test_a_tokenizer_by_other_rules_is_found(subject, old, new, found):
    rules = subject.template.tokenizer.backend_tokenizer.to_str()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(rules.replace(old, new)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    drifted = Subject(
        FAMILY, subject.model, ChatTemplate(subject.template.template, tokenizer, subject.template.images), "float32"
    )
    assert found in check_tokens(drifted).found


# --------------------------------------------------------------------------------------------------- the environment


def test_bitsandbytes_works_here():
    assert environment.check_bitsandbytes().result == "ok"


@pytest.mark.parametrize("wrong", ["raises", "rounds"])
def test_bitsandbytes_that_does_not_work_is_found(monkeypatch, wrong):
    forward = bitsandbytes.nn.Linear4bit.forward

    def broken(layer, inputs):
        if wrong == "raises":
            raise RuntimeError("no kernel image\nis available")
        return forward(layer, inputs) * 1.1

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
    finding = environment.check_bitsandbytes()
    expected = {"raises": "RuntimeError: no kernel image", "rounds": "a product with 4-bit weights is wrong"}
    assert (finding.result, finding.found) == ("failed", expected[wrong])


def test_versions_are_compared_with_what_is_tested_and_what_is_allowed(monkeypatch):
    tested = environment.tested_versions()
    changed = {"torch": tested["torch"] + "+cu130", "transformers": "5.99.0", "trl": "0.1"}

    def version(name):
        if name == "peft":
            raise PackageNotFoundError(name)
        return changed.get(name, tested[name])

    monkeypatch.setattr(environment, "version", version)
    found = {finding.name: finding.result for finding in environment.check_versions()}
    assert others_than(found, "ok") == {"transformers": "warning", "trl": "failed", "peft": "failed"}
    assert environment.versions_in_a_line().found == "trl 0.1, needs >=1.16; peft not installed"


# ------------------------------------------------------------------------------------------------- before training


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def base_with(folder: Path, change) -> Path:
    """The shipped base with other weights."""
    shutil.copytree(resolve("shipped:tiny_base"), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_training_with_weights_that_are_not_numbers_stops_before_the_first_step(recipe, tmp_path, refusal):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    base = base_with(tmp_path / "base", spoil)
    line = refusal("train", recipe, f"model.path={base}")
    assert "weights: 1 tensors hold NaN or infinity, model.layers.1.mlp.up_proj.weight among them" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_closed_gates_are_told_and_the_random_numbers_of_training_are_not_touched(recipe, tmp_path):
    def close(weights):
        for name in weights:
            if ".alpha_" in name:
                weights[name].zero_()

    found = load_recipe(recipe, [f"model.path={base_with(tmp_path / 'base', close)}", "model.mode=qlora"])
    base = prepare_base(found)
    trained = load_for_training(found, FAMILY, base).train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    template = load_template(FAMILY, base)
    (warning,) = before_training.before_training(found, FAMILY, trained, template, tmp_path / "run")
    assert warning.startswith("gates: all are 0: no image has any effect yet; ")
    assert torch.equal(torch.get_rng_state(), before) and trained.training
    assert not (tmp_path / "run").exists()


def test_room_is_that_of_the_weights_that_are_written(recipe, tmp_path):
    found = load_recipe(recipe)  # 4 steps, a checkpoint every 2
    trained = load_for_training(found, FAMILY, prepare_base(found))
    numbers = sum(p.numel() for p in trained.parameters())
    room = before_training.room_for(found, FAMILY, trained)
    assert (room.snapshot, room.state) == (2 * numbers, 12 * numbers)
    assert room.total == 2 * (room.snapshot + room.state)
    weights.save_model(trained, tmp_path / "saved", torch.bfloat16)
    written = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert abs(written - room.snapshot) < 0.01 * written


@pytest.mark.parametrize(("free", "result"), [(99, "failed"), (100, "warning"), (300, "ok")])
def test_a_disk_that_is_too_full_is_told(monkeypatch, tmp_path, free, result):
    monkeypatch.setattr(before_training.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    room = before_training.Room(snapshot=80, state=20, total=300)
    finding = before_training.check_room(tmp_path / "not" / "yet", room)
    assert finding.result == result
    if result == "failed":
        with pytest.raises(UserError, match="a checkpoint takes"):
            raise_failed([finding])


def test_an_output_dir_that_cannot_be_written_is_refused_before_anything_is_prepared(recipe, tmp_path, refusal):
    (tmp_path / "notes").write_text("")
    line = refusal("train", recipe, "output_dir=notes/run")
    assert "output_dir notes/run: " in line and "is a file; choose another output_dir" in line
    assert not (tmp_path / "stores").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that takes no file, whoever asks")
def test_a_folder_that_takes_no_file_is_refused_and_nothing_stays_in_one_that_does(tmp_path):
    with pytest.raises(UserError, match="/proc cannot be written to; choose another output_dir"):
        before_training.check_writable(Path("/proc/run"))
    before_training.check_writable(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_machine_is_no_mistake_of_the_user_s():
    with pytest.raises(RunError, match="bitsandbytes on this device: broken"):
        raise_failed([environment.Finding(name="bitsandbytes on this device", result="failed", found="broken")])


# --------------------------------------------------------------------------------------------------------- commands


def test_doctor_finds_the_environment_sound(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status_of("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 0
    assert {"torch", "device", "bfloat16", "free disk"} <= {check["name"] for check in report["checks"]}


def test_doctor_goes_through_a_model_and_ends_with_1_where_it_cannot_be_used(recipe, tmp_path, capsys):
    base = prepare_base(load_recipe(recipe))
    assert status_of("doctor", "--model", base, "--json") == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in checks][-8:] == ["model loads", *CHECKS, "grouped attention"]
    damaged = base_with(tmp_path / "base", lambda weights: weights.pop("model.norm.weight"))
    assert status_of("doctor", "--model", damaged) == 1
    printed = " ".join(capsys.readouterr().out.split())  # folded at the width of the terminal
    assert "failed model loads" in printed and "model.norm.weight among them" in printed


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where"])
def test_doctor_refuses_a_model_that_is_not_there(refusal, name):
    assert "neither a model folder" in refusal("doctor", "--model", name)


def test_a_dry_run_measures_a_step_and_writes_nothing(recipe, tmp_path, capsys):
    assert status_of("train", recipe, "--dry-run", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    costliest_one, caps = report["micro_batches"]
    assert report["device"] in ("cpu", "cuda") and report["precision"] == "float32"
    assert "first window" in costliest_one["what"] and "caps" in caps["what"]
    assert (caps["tokens"], caps["images"]) == (128, 24)
    assert costliest_one["tokens"] <= 128 and min(costliest_one["seconds"], caps["peak_memory_bytes"]) > 0
    assert not (tmp_path / "run").exists()


def test_the_costliest_micro_batch_is_that_of_the_first_window_and_the_caps_exceed_it(recipe):
    found = load_recipe(recipe, ["training.micro_batch_packs=2", "data.max_images_per_pack=3"])
    sources = prepare(found)
    planner = Planner(sources.sources, found.data, packs_per_step=2, seed=0)
    plans = Plans(sources, planner, micro_batch_packs=2, image_cost=1000.0)

    def images(plan):
        samples = [sources.reader.sample(place) for pack in plan.packs for place in pack]
        return len({image for sample in samples for image in sample.images})

    first_window = [plan for plan, _ in zip(plans, range(32), strict=False)]
    again = Planner(sources.sources, found.data, packs_per_step=2, seed=0)
    other = Plans(sources, again, micro_batch_packs=2, image_cost=1000.0)
    assert images(costliest(other)) == max(map(images, first_window))
    base = prepare_base(found)
    template = load_template(FAMILY, base)
    batch = batch_of_caps(found, FAMILY, SimpleNamespace(config=weights.load_config(base)), template)
    assert (len(batch.input_ids_T), batch.num_images) == (256, 6)
    assert batch.segment_ids_T.tolist() == [0] * 128 + [1] * 128
    assert sorted(set(batch.image_ids_T.tolist())) == [0, 1, 2, 3, 4, 5]


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    code = "".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "sft").rglob("*.py"))
    messages = re.findall(r"^### `(.*)`$", page, flags=re.MULTILINE)
    assert [message for message in messages if message not in code] == [] and len(messages) > 20
    checks = re.findall(r"^\| `(.*?)` \|", page, flags=re.MULTILINE)
    assert checks == [*CHECKS, "grouped attention"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_disk_that_fills_up_leaves_nothing_of_the_checkpoint(tmp_path, error):
    def write(folder):
        (folder / "half").write_text("")
        raise error

    with pytest.raises(RunError, match="checkpoint-2: the disk is full; checkpoints before it are whole"):
        write_folder(tmp_path / "checkpoint-2", write)
    assert list(tmp_path.iterdir()) == []
