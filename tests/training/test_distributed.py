"""Several processes train as one does. Each run is a command of its own, with a time limit: what may go wrong is that
one process waits for ever for another."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import two_processes
from conftest import batch_of, conversation, document, make_tiny_model, place
from helpers.processes import SECONDS, assert_same_steps, lines_of, sft
from helpers.tiled import KINDS, byte_tokenizer, tiny_folder
from helpers.tiled import write_recipe as write_tiled_recipe
from helpers.training import Watch, trainer_of, write_recipe
from safetensors.torch import load_file
from two_processes import OPTIONS, TILED
from two_ranks import step

from sft.batches.data_loader import MicroBatches
from sft.batches.pack_stream import Planner
from sft.batches.steps import Plans
from sft.core.distributed import ALONE, Rank, launched_rank
from sft.core.errors import RunError, UserError
from sft.core.sample import NO_SOURCE
from sft.data.prepare import open_prepared, prepare
from sft.models.idefics.weights import weights
from sft.recipe import load_recipe
from sft.runs.checkpoint import MANIFEST, STATE, broken_files, checkpoints, is_complete
from sft.training.engines import check_readable, choose_engine, get_engine

REPOSITORY = Path(__file__).parent.parent.parent
DEEPSPEED = REPOSITORY / ".cache" / "deepspeed"
"""Where scripts/install_deepspeed puts it."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Pictures, and talk without any."""
    return write_recipe(tmp_path_factory.mktemp("distributed"))


def on_two_processes(script: str, *arguments: object) -> None:
    """Run a script of this folder in two processes that are connected."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(REPOSITORY / "tests" / script), *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        for rank in "01"
    ]
    deadline = time.monotonic() + SECONDS
    try:
        said = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said


@pytest.fixture(scope="module")
def tiled(tmp_path_factory) -> list[Path]:
    """Recipes of a SmolVLM whose head is a matrix of its own, and of one whose head is its embeddings."""
    folder, tokenizer = tmp_path_factory.mktemp("tiled"), byte_tokenizer()
    recipes = []
    for name in ("smolvlm", "tied"):
        base = tiny_folder(folder / name / "base", tokenizer, **KINDS[name])
        recipes.append(write_tiled_recipe(base.parent, base))
        run = two_processes.recipe_of(recipes[-1], "ddp", base.parent / "alone", TILED)
        prepare(run)
        two_processes.trained(run, ALONE)
    return recipes


def assert_trained_as_alone(folder: Path, tiled: list[Path]) -> None:
    for recipe in tiled:
        assert_same_run(folder / recipe.parent.name, recipe.parent / "alone")


@pytest.fixture(scope="module")
def alone(recipe) -> Path:
    """The run of one process."""
    run_dir = recipe.parent / "alone"
    done = sft("train", recipe, f"output_dir={run_dir}", *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    return run_dir


def computed(run_dir: Path) -> list[dict]:
    """What was computed at each step, without what it took."""
    took = ("time", "tokens_per_second", "data_wait", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in took} for line in lines_of(run_dir)]


def hashes(run_dir: Path, *kinds: str) -> dict[str, str]:
    """Of the last checkpoint's weights and state, as its manifests have them."""
    folder = checkpoints(run_dir / "checkpoints")[-1]
    found = {}
    for part in (folder, folder / STATE):
        files = json.loads((part / MANIFEST).read_text())
        found |= {name: file["xxh3"] for name, file in files.items() if name.endswith(kinds)}
    return found


def assert_same_run(found: Path, expected: Path) -> None:
    assert_same_steps(found, expected)
    for folder, own_folder in zip(*(checkpoints(one / "checkpoints") for one in (found, expected)), strict=True):
        assert broken_files(folder) == []
        weights, own_weights = (load_file(one / "model.safetensors") for one in (folder, own_folder))
        assert weights.keys() == own_weights.keys()
        apart = [(weights[name].float() - own_weights[name].float()).abs().max() for name in weights]
        assert max(apart) < 0.01, "of weights rounded to bfloat16"
        assert {file.name for file in folder.iterdir()} == {file.name for file in own_folder.iterdir()}
        assert is_complete(folder / STATE) and broken_files(folder / STATE) == []


@pytest.mark.slow
def test_two_copies_train_as_one_does(recipe, alone, tiled):
    """Five packs: the last micro-batch of one process is a dummy."""
    folder = recipe.parent / "ddp"
    folder.mkdir()
    on_two_processes("two_processes.py", "ddp", folder, recipe, *tiled)
    assert_same_run(folder / "whole", alone)
    assert_trained_as_alone(folder, tiled)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_model_that_is_shared_out_trains_as_a_whole_one_does_with_a_break_and_without(
    recipe, alone, tiled, engine, tmp_path, monkeypatch
):
    if engine == "zero3":
        if not DEEPSPEED.is_dir() and os.environ.get("IDEFICS_SFT_SYSTEM_PACKAGES") != "1":
            pytest.skip("DeepSpeed is not here; run scripts/install_deepspeed")
        monkeypatch.setenv("PYTHONPATH", str(DEEPSPEED))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        monkeypatch.syspath_prepend(DEEPSPEED)  # here too: one process alone has what two have written converted
    folder = recipe.parent / engine
    folder.mkdir()
    on_two_processes("two_processes.py", engine, folder, recipe, *tiled)
    assert_same_run(folder / "whole", alone)
    assert_trained_as_alone(folder, tiled)

    # To the bit after a break on as many processes.
    assert computed(folder / "broken") == computed(folder / "whole")
    assert hashes(folder / "broken", ".safetensors", ".distcp") == hashes(folder / "whole", ".safetensors", ".distcp")

    # One process goes on with what two have written.
    whole = two_processes.recipe_of(recipe, engine, folder / "broken-stopped", two_processes.OPTIONS)
    two_processes.trained(whole, ALONE, folder / "broken-stopped" / "checkpoints" / "checkpoint-1")
    assert_same_steps(folder / "broken-stopped", alone)

    # Adapters, gradient checkpointing and held-out loss.
    adapters = two_processes.recipe_of(recipe, "ddp", tmp_path / "lora", two_processes.LORA)
    two_processes.trained(adapters, ALONE)
    assert_same_steps(folder / "lora", tmp_path / "lora")
    weights, own = (one / "checkpoints" / "checkpoint-2" for one in (folder / "lora", tmp_path / "lora"))
    assert {file.name for file in weights.iterdir()} == {file.name for file in own.iterdir()}
    weights, own = (load_file(one / "adapter_model.safetensors") for one in (weights, own))
    assert weights.keys() == own.keys() and any(tensor.any() for name, tensor in own.items() if "lora_B" in name)
    assert max((weights[name] - own[name]).abs().max() for name in own) < 1e-4


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(recipe, alone):
    run_dir = recipe.parent / "stopped"
    run_dir.mkdir()
    (run_dir / "stop").touch()
    arguments = ("train", recipe, f"output_dir={run_dir}", *OPTIONS, "distributed.engine=ddp")
    stopped = sft(*arguments, "--nproc", 2)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped after step 1" in stopped.stdout and len(lines_of(run_dir)) == 1
    done = sft(*arguments)
    assert done.returncode == 0, done.stderr
    assert_same_steps(run_dir, alone)


# ----------------------------------------------------------------------------------------------- one step, many ways

SAMPLES = (
    conversation(("<dog>", "What is it?"), "A dog.", key="dog"),
    conversation("Hi.", "Hello.", system="A dog and a cat.", key="hello"),
    document("A fox.", "<fox>", "The quick brown fox.", key="fox"),
    conversation(("<cat>", "A cat.", "<bird>", "And this?"), "A dog.", "Sure?", "Yes.", key="cat"),
    document("0123456789", key="numbers"),
)


@pytest.fixture(scope="module")
def ways(template, tmp_path_factory):
    """The gradients and the line of metrics of one step, by name of the way in which it was made: the first four packs
    or all five of them, of which two processes have three places each and so one dummy."""
    folder = tmp_path_factory.mktemp("ways")
    packs = [[place(template, sample)] for sample in SAMPLES]
    wholes = {number: batch_of(*packs[:number]) for number in (4, 5)}

    def micro_batch(number: int, *of):
        own = [packs[pack] for pack in of] or [[]]
        return batch_of(*own, num_trained_tokens=wholes[number].num_trained_tokens, always_whole=True)

    two = {
        "2 x 2": ([[micro_batch(4, 0), micro_batch(4, 1)], [micro_batch(4, 2), micro_batch(4, 3)]], {"of_all": 4}),
        "2 x 3": (
            [
                [micro_batch(5, 0), micro_batch(5, 2), micro_batch(5, 4)],
                [micro_batch(5, 1), micro_batch(5, 3), micro_batch(5)],
            ],
            {"of_all": 5},
        ),
    }
    two |= {
        f"{name}, 2023": (ranks, more | {"normalisation": "micro_batch_mean"}) for name, (ranks, more) in two.items()
    }
    torch.save(two, folder / "work.pt")
    template.tokenizer.save_pretrained(folder / "tokenizer")
    on_two_processes("two_ranks.py", folder)
    found = torch.load(folder / "found.pt", weights_only=False)
    for number, whole in wholes.items():
        alone = [micro_batch(number, pack) for pack in range(number)]
        found[f"1 x {number}"] = step(folder / "alone", template.tokenizer, alone, of_all=number)
        found[f"{number} at once"] = step(folder / "alone", template.tokenizer, [whole], of_all=1)
    return folder, found


def assert_same_step(found, expected) -> None:
    """To 1e-6 of the loss and, number by number, of the gradient's norm."""
    (gradients, line), (own_gradients, own_line) = found, expected
    assert line["loss"] == pytest.approx(own_line["loss"], rel=1e-6)
    assert gradients.keys() == own_gradients.keys()
    norm = torch.nn.utils.get_total_norm(own_gradients.values())
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    for name, gradient in own_gradients.items():
        assert (gradients[name] - gradient).abs().max() < 1e-6 * norm, name


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 5], ids=["without a dummy", "with a dummy"])
def test_accumulation_processes_and_one_big_batch_make_the_same_step(ways, number):
    _, found = ways
    for name in (f"2 x {-(-number // 2)}", f"1 x {number}"):
        assert_same_step(found[name], found[f"{number} at once"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 5], ids=["without a dummy", "with a dummy"])
def test_two_processes_take_the_mean_of_micro_batch_means_as_in_2023(ways, template, number):
    """m4: cross entropy averaged over each micro-batch's tokens, divided by their number on a rank, averaged over ranks
    (equally many each): the mean of all. A dummy is none of them."""
    _, found = ways
    model = make_tiny_model(template.tokenizer).train()
    weights.select_trainable(model)
    means = [model(batch=batch_of([place(template, sample)])).loss for sample in SAMPLES[:number]]
    torch.stack(means).mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    norm = torch.nn.utils.get_total_norm(expected.values())
    gradients, line = found[f"2 x {-(-number // 2)}, 2023"]
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() < 1e-6 * norm, name
    token_mean, _ = found[f"{number} at once"]
    assert max((token_mean[name] - expected[name]).abs().max() for name in expected) > 1e-3 * norm, "the two differ"
    assert line["loss"] == pytest.approx(found[f"{number} at once"][1]["loss"], rel=1e-6), "what is shown is the same"


def test_a_spike_names_the_packs_of_all_processes(ways):
    folder, _ = ways
    (line,) = map(json.loads, (folder / "2 x 3" / "spikes.jsonl").read_text().splitlines())
    sums = [pack["loss"] * pack["trained_tokens"] for pack in line["packs"]]
    assert len(sums) == 4 and sums == sorted(sums, reverse=True)
    ranks = {"dog": 0, "fox": 0, "numbers": 0, "hello": 1, "cat": 1}
    assert all(pack["rank"] == ranks[pack["samples"][0]] for pack in line["packs"])
    assert {pack["rank"] for pack in line["packs"]} == {0, 1}


# -------------------------------------------------------------------------------------------------- who has what


def num_real(batch) -> tuple[int, int]:
    """Tokens and images of a batch, without its dummies."""
    is_real_T = batch.source_ids_T != NO_SOURCE
    return int(is_real_T.sum()), len(set(batch.image_ids_T[is_real_T].tolist()) - {-1})


def test_the_steps_have_what_could_make_ranks_wait(recipe, tiled):
    """So that the tests above show something: a rank with no pack, and one without images beside one with some."""
    for path, options in ((recipe, OPTIONS), (tiled[0], TILED)):
        own = load_recipe(path, options)
        sources, template = prepare(own), open_prepared(own)[1]
        packs = own.training.tokens_per_step // own.data.sequence_length
        of_ranks = []
        for number in range(2):
            planner = Planner(sources.sources, own.data, packs_per_step=packs, seed=own.seed)
            plans = Plans(sources, planner, micro_batch_packs=1, rank=Rank(number, 2))
            batches = islice(MicroBatches(plans, template.images), 3 * own.training.max_steps)
            of_ranks.append([num_real(batch["batch"]) for batch in batches])
        together = list(zip(*of_ranks, strict=True))
        assert any((0, 0) in pair for pair in together), "no pack"
        only_one = [one[0] and other[0] and (one[1] == 0) != (other[1] == 0) for one, other in together]
        assert sum(only_one) >= (4 if path in tiled else 1), "one has images, the other has text"


@pytest.mark.slow
def test_torchrun_starts_the_same_and_one_line_says_what_is_wrong(recipe, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sft.cli.main")
    done = sft("train", recipe, f"data.store={tmp_path}", f"output_dir={tmp_path / 'run'}", launcher=torchrun)
    ours = [line for line in done.stderr.splitlines() if line.startswith("idefics-sft: ")]
    assert len(ours) == 1, done.stderr
    assert f"run `idefics-sft prepare {recipe} data.store=" in ours[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_and_is_named(recipe):
    run_dir = recipe.parent / "killed"
    command = [sys.executable, "-m", "sft.cli.main", "train", str(recipe), f"output_dir={run_dir}", "--nproc", "2"]
    command += ["training.max_steps=1000", "distributed.engine=ddp"]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + SECONDS
        while not (run_dir / "run.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, said = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    assert "process 1 of 2 was ended by SIGKILL" in said
    assert said.count("idefics-sft: ") == 1 and "Traceback" not in said


# ------------------------------------------------------------------------------------------------------------- SLURM


@pytest.mark.parametrize("status", [0, 1, 75])
def test_a_job_is_queued_again_when_it_was_stopped_and_only_then(tmp_path, status):
    """What SLURM gives a job stands in for it: `srun` says how it was called, `scontrol` too."""
    commands = {"srun": f'echo "srun $*"; exit {status}', "scontrol": 'echo "scontrol $*" | tee -a queue'}
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    command = ["bash", str(REPOSITORY / "scripts" / "slurm" / "train.sbatch"), "my-data", "output_dir=a b"]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status and not done.stderr
    assert "idefics-sft train my-data output_dir=a b" in done.stdout
    assert "--kill-on-bad-exit=0 --wait=60" in done.stdout, "else the first task that ends with 75 kills the others"
    queue = (tmp_path / "queue").read_text().splitlines()
    assert queue == ["scontrol show hostnames n[1-2]"] + ["scontrol requeue 7"] * (status == 75)


# ----------------------------------------------------------------------------------------------------- which is which


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ALONE),  # the batch script, and no task of srun
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, Rank(3, 8)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "1"}, Rank(1, 2)),
    ],
)
def test_the_environment_says_which_process_this_is(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"MASTER_ADDR": "here", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == expected
    if expected.of > 1:
        monkeypatch.delenv("MASTER_ADDR")
        with pytest.raises(UserError, match="no MASTER_ADDR"):
            launched_rank()


def test_engines_are_refused_where_they_cannot_do_what_is_asked(monkeypatch):
    monkeypatch.setattr("sft.training.engines.zero3.find_spec", lambda name: None)
    assert choose_engine("auto", "full", ALONE) == choose_engine("auto", "lora", Rank(0, 2)) == "ddp"
    for engine, mode, expected in (
        ("auto", "full", "needs DeepSpeed, which is not installed"),
        ("zero3", "qlora", "cannot shard weights in 4 bits"),
        ("fsdp2", "qlora", "cannot shard weights in 4 bits"),
    ):
        with pytest.raises(UserError, match=expected):
            choose_engine(engine, mode, Rank(0, 2))
    with pytest.raises(UserError, match="fsdp2 shards the states of adamw, not of adamw_8bit"):
        choose_engine("fsdp2", "full", Rank(0, 2), "adamw_8bit")
    with pytest.raises(UserError, match="fsdp2 does not train in float16"):
        get_engine("fsdp2").check_precision("float16")


def test_a_state_that_an_engine_cannot_read_is_refused(monkeypatch):
    monkeypatch.setattr("sft.training.engines.zero3.find_spec", lambda name: None)
    by_two = {"engine": "zero3", "processes": 2}
    for written_by, engine, processes, expected in (
        (by_two, "fsdp2", 2, "was written under zero3, which fsdp2 cannot read; set distributed.engine=zero3"),
        ({"engine": "ddp", "processes": 1}, "fsdp2", 2, "was written under ddp, which fsdp2 cannot read"),
        (by_two, "ddp", 1, "DeepSpeed has to convert it, and is not installed"),
    ):
        with pytest.raises(UserError, match=expected):
            check_readable(Path("checkpoint-1"), written_by, engine, Rank(0, processes))
    check_readable(Path("checkpoint-1"), by_two, "zero3", Rank(0, 2))
    check_readable(Path("checkpoint-1"), {"engine": "fsdp2", "processes": 2}, "ddp", ALONE)


def test_what_libraries_leave_whole_is_not_taken_for_shared_out(model):
    with pytest.raises(RunError, match="fsdp2 has not sharded the model: it is a PackedIdefics"):
        get_engine("fsdp2").check_prepared(model)


def test_no_gradient_moves_weights_as_a_gradient_of_zero_does(template, tmp_path, model):
    """A step of text alone: on one device the tower is not called, on several it looks at a black image."""
    weights.select_trainable(model)
    samples = (conversation(("<dog>", "What is it?"), "A dog."), conversation("Hi.", "Hello."))
    batches = [batch_of([place(template, sample)]) for sample in samples]
    trainer = trainer_of(model, template, batches, tmp_path, 1, max_steps=2)
    weight = model.model.vision_model.encoder.layers[0].mlp.fc1.weight
    after_steps = []
    trainer.add_callback(Watch(lambda: after_steps.append(weight.detach().clone())))
    trainer.train()
    assert not torch.equal(*after_steps)
