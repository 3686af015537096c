"""Work on other cores."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rmse_edge.cli.common import total_bar
from rmse_edge.quantize.parallel import aside, one_thread

forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux only")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no other thread ran: where tests run in several processes, one of pytest's own waits for messages."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


@forks
@pytest.mark.usefixtures("alone")
def test_work_aside_is_done_in_another_process() -> None:
    x = torch.arange(6.0).view(2, 3)
    with one_thread(torch.nn.Linear(1, 1)), aside(lambda: (os.getpid(), x @ x.T), idle=True) as result:
        found = result()
    assert found is not None and found[0] != os.getpid() and torch.equal(found[1], x @ x.T)


def test_without_an_idle_core_nothing_is_done() -> None:
    with aside(lambda: 1, idle=False) as result:
        assert result() is None


@forks
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("work", [lambda: 1 / 0, lambda: os._exit(9), lambda: lambda: None])
def test_work_that_fails_has_no_result(work: object, capfd: pytest.CaptureFixture[str]) -> None:
    """It raises, is killed, or returns what cannot be sent: who needs the result computes it, and reports that."""
    with aside(work, idle=True) as result:  # type: ignore[arg-type]
        assert result() is None
    assert capfd.readouterr() == ("", "")


@forks
@pytest.mark.usefixtures("alone")
def test_ctrl_c_is_not_for_the_work_aside(capfd: pytest.CaptureFixture[str]) -> None:
    """A terminal sends it to all processes; only the one the person started says something."""
    with aside(lambda: (os.kill(os.getpid(), signal.SIGINT), np.ones((3, 4)))[1], idle=True) as result:
        assert np.array_equal(result(), np.ones((3, 4)))
    assert capfd.readouterr() == ("", "")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@forks
@pytest.mark.slow
def test_work_aside_dies_with_a_process_that_is_killed() -> None:
    """Otherwise it would go on, and hold the locks of files that were being written."""
    code = (
        "import os, signal, sys, time\n"
        "from rmse_edge.quantize.parallel import aside\n"
        "def work():\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "with aside(work, idle=True):\n    sys.stdin.readline()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and int(process.stdout.readline())
        process.kill()
        assert process.stdout.read() == b""  # nobody holds the other end any longer


@forks
def test_beside_other_threads_no_process_is_copied() -> None:
    """One of them might hold a lock, which nobody would free in the copy."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with aside(os.getpid, idle=True) as result:
            assert result() is None
    finally:
        done.set()
        thread.join()


@forks
@pytest.mark.usefixtures("alone")
def test_without_another_process_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", fork)
    with aside(os.getpid, idle=True) as result:
        assert result() is None


@forks
@pytest.mark.usefixtures("alone")
def test_a_bar_on_a_terminal_brings_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with total_bar() as part, aside(os.getpid, idle=True) as result:
        part(1.0)("working", 0.5)
        assert result() is not None
    assert "working" in terminal.getvalue()


@forks
@pytest.mark.usefixtures("alone")
def test_a_failure_ends_the_work_aside() -> None:
    with pytest.raises(KeyError), aside(lambda: time.sleep(600), idle=True):
        raise KeyError
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("threads", "idle"), [(1, False), (2, True)])
def test_a_small_model_leaves_cores_idle_that_were_to_be_used(threads: int, idle: bool) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with one_thread(torch.nn.Linear(1, 1)) as found:
            assert found is idle and torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
