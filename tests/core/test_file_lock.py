"""One process at a time writes in a folder."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft.core.errors import UserError
from sft.core.file_lock import locked


def test_a_lock_that_was_removed_while_it_was_waited_for_holds_nothing(tmp_path, monkeypatch):
    """Between opening the file and holding it, its last holder may have removed it, and another made a new one."""
    lock_it = fcntl.flock

    def flock(file, how):
        monkeypatch.setattr("fcntl.flock", lock_it)
        (tmp_path / ".lock").unlink()
        lock_it(file, how)

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path), pytest.raises(UserError, match="another idefics-sft is writing here"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir()), "nothing is left of it"


@pytest.mark.parametrize("beside", [True, False])
def test_a_folder_that_cannot_be_made_is_not_taken_for_held(beside):
    expected = r"cannot be made or written to: .*'/proc/nowhere'"
    with pytest.raises(OSError, match=expected), locked(Path("/proc/nowhere"), beside=beside):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    code = "import sys, time; from pathlib import Path; from sft.core.file_lock import locked\n"
    code += "with locked(Path(sys.argv[1]), beside=True): print('held', flush=True); time.sleep(60)"
    folder = tmp_path / "store"
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="store: another idefics-sft"), locked(folder, beside=True):
            pass
        os.kill(process.pid, signal.SIGKILL)
    with locked(folder, beside=True):
        assert (tmp_path / ".store.lock").exists()
