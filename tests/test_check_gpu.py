"""scripts/check_gpu in small, so that it works on the day on which a GPU is there."""

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader

import pytest
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "check_gpu"


@pytest.fixture(scope="module")
def check_gpu():
    loader = SourceFileLoader("check_gpu", str(SCRIPT))
    module = module_from_spec(spec_from_loader("check_gpu", loader))
    sys.modules["check_gpu"] = module  # its dataclasses look themselves up
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    yield module
    del sys.modules["check_gpu"]


@pytest.mark.parametrize("name", ["attention", "packed"])
def test_a_section_finds_nothing_wrong_here(check_gpu, tmp_path, name):
    section = check_gpu.Section(name, tmp_path, True)
    getattr(check_gpu, name)(section)
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert rows
    assert [row for row in rows if not row["ok"]] == []


def test_what_fails_is_a_row_and_the_next_goes_on(check_gpu, tmp_path):
    section = check_gpu.Section("attention", tmp_path, True)
    section.attempt("broken", lambda: 1 / 0)
    section.attempt("sound", lambda: {"ok": True})
    broken, sound = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert broken["error"].startswith("ZeroDivisionError")
    assert sound["ok"]


@pytest.mark.slow
def test_sections_are_processes_with_a_limit_each(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "attention", "lora", "--json", str(file)]
    subprocess.run(command, check=True, timeout=300)
    sections = json.loads(file.read_text())["sections"]
    assert [len(sections[name]["rows"]) for name in ("attention", "lora")] == [8, 3]
    assert sections["lora"]["rows"][0]["loss"] > 0
