"""What fails for want of memory, disk or another process ends with one line that says so. No line tells a secret."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, status_of
from helpers.training import write_recipe

from sft.core.errors import RunError, printable
from sft.recipe import load_recipe, with_overrides
from sft.runs.checkpoint import newest_state, write_folder
from sft.runs.status import RunStatus
from sft.training.metrics import append_line
from sft.training.out_of_memory import explain_out_of_memory, lighter_settings
from sft.training.run_folder import recorded
from sft.training.trainer import Trainer

FAR_TOO_MUCH = 2**50
"""Numbers: four million gigabytes."""


def test_too_little_memory_is_one_line_that_names_what_to_change(tmp_path, monkeypatch, capsys):
    def compute_loss(self, *args, **kwargs):
        return torch.empty(FAR_TOO_MUCH)

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    assert status_of("train", write_recipe(tmp_path), "training.micro_batch_packs=2") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("idefics-sft: step 1: out of memory; less takes: ")
    for change in (
        "micro_batch_packs=1 (is 2)",
        "gradient_checkpointing=true",
        "sequence_length (is 128)",
        "mode=qlora",
    ):
        assert change in said
    assert RunStatus.read(tmp_path / "run").status == "failed"


def test_a_precision_that_is_not_to_be_had_is_told_before_anything_is_prepared(tmp_path, refusal, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "float16 needs a GPU" in refusal("train", write_recipe(tmp_path), "training.precision=float16")
    assert not (tmp_path / "stores").exists()


def test_what_is_done_already_is_not_advised(tmp_path):
    overrides = ("model.mode=qlora", "training.gradient_checkpointing=true", "training.optimizer=paged_adamw_8bit")
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    assert lighter_settings(recipe).startswith("a smaller data.max_images_per_pack")
    for optimizer, advised in (("adamw", True), ("adamw_8bit", True), ("adafactor", False)):
        settings = lighter_settings(with_overrides(recipe, [f"training.optimizer={optimizer}"]))
        assert ("training.optimizer=paged_adamw_8bit" in settings) == advised, optimizer
    with pytest.raises(RunError, match="tiny: out of memory"), explain_out_of_memory(recipe, lambda: "tiny"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    with pytest.raises(RuntimeError, match="is invalid"), explain_out_of_memory(recipe, lambda: "tiny"):
        raise RuntimeError("shape '[2]' is invalid")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_and_the_first_reason_is_told(tmp_path):
    with pytest.raises(RunError, match=r"/dev/full: the disk is full; checkpoints before it are whole"):
        append_line(Path("/dev/full"), {"step": 1})
    (tmp_path / ".run.json.staging").symlink_to("/dev/full")

    def status(state, why):
        return RunStatus(status=state, why=why, step=1, max_steps=2)

    with pytest.raises(RunError, match=r"run\.json: the disk is full"), recorded(tmp_path, status):
        pass
    with pytest.raises(RunError, match="the first reason"), recorded(tmp_path, status):
        (tmp_path / ".run.json.staging").symlink_to("/dev/full")
        raise RunError("the first reason")


def test_a_disk_that_fills_up_while_data_are_prepared_is_one_line(tmp_path, monkeypatch, capsys):
    def prepare(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write does: without a name

    monkeypatch.setattr("sft.data.prepare.prepare", prepare)
    assert status_of("train", write_recipe(tmp_path)) == 1
    assert capsys.readouterr().err == "idefics-sft: No space left on device\n"


def test_a_manifest_that_is_damaged_is_a_state_that_is_not_whole(tmp_path):
    for step in (1, 2):
        write_folder(
            tmp_path / f"checkpoint-{step}", lambda folder: None, lambda folder: (folder / "a").write_text("a")
        )
    (tmp_path / "checkpoint-2" / "state" / "manifest.json").write_text('{"a": {"by')
    said = []
    assert newest_state(tmp_path, said.append) == tmp_path / "checkpoint-1"
    assert "checkpoint-2: not resumed from: files of state/ are missing or cut off" in said[0]


HANGS = """
import sys, time
from datetime import timedelta
import sft.core.distributed as distributed
distributed.TIMEOUT = timedelta(seconds=2)
import sft.cli.main
from sft.cli.main import main
def hang(*arguments, **options):
    with distributed.process_group() as rank:
        if rank.number:
            time.sleep(60)
        distributed.barrier()
sft.cli.main.app = hang
main([])
"""


def test_a_process_that_hangs_is_waited_for_so_long_and_no_longer():
    """The one that waits says so and ends; `launch`, torchrun or srun end the other then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port)}
    command = [sys.executable, "-c", HANGS]
    hanging = subprocess.Popen(command, env=shared | {"RANK": "1", "LOCAL_RANK": "1"})
    try:
        waiting = shared | {"RANK": "0", "LOCAL_RANK": "0"}
        done = subprocess.run(command, env=waiting, capture_output=True, text=True, timeout=120, check=False)
    finally:
        hanging.kill()
        hanging.wait()
    ours = [line for line in done.stderr.splitlines() if line.startswith("idefics-sft: ")]
    assert done.returncode == 1 and len(ours) == 1 and "Traceback" not in done.stderr
    assert "process 0 of 2: another one is gone or late" in ours[0]


WORKS = """
import time
from sft.core.parallel import ordered_map
if __name__ == "__main__":
    for _ in ordered_map(time.sleep, [0, 0, *[60] * 6], 2):
        print("one", flush=True)
"""


def test_ctrl_c_ends_the_work_of_other_processes_at_once(tmp_path):
    (tmp_path / "works.py").write_text(WORKS)
    command, environment = [sys.executable, tmp_path / "works.py"], os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as working:
        assert working.stdout.readline() == working.stdout.readline() == b"one\n"
        os.killpg(working.pid, signal.SIGINT)  # as a terminal does
        assert working.wait(timeout=30)


def test_no_line_tells_a_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = "https://me:pass@host/x: 401 for hf_abcdefghijklmnopqrstuvwxyz with 0123456789abcdef"
    assert printable(text) == "https://***@host/x: 401 for *** with ***"
