"""Work on other cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

import pytest
import torch

from rmse_edge.quantize.parallel import aside, one_thread

forks = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux only")


@forks
def test_work_aside_is_done_in_another_process() -> None:
    x = torch.arange(6.0).view(2, 3)
    with one_thread(torch.nn.Linear(1, 1)), aside(lambda: (os.getpid(), x @ x.T), idle=True) as result:
        found = result()
    assert found is not None and found[0] != os.getpid() and torch.equal(found[1], x @ x.T)


def test_without_an_idle_core_nothing_is_done() -> None:
    with aside(lambda: 1, idle=False) as result:
        assert result() is None


@forks
@pytest.mark.parametrize("work", [lambda: 1 / 0, lambda: os._exit(9), lambda: lambda: None])
def test_work_that_fails_has_no_result(work: object, capfd: pytest.CaptureFixture[str]) -> None:
    """It raises, is killed, or returns what cannot be sent: who needs the result computes it, and reports that."""
    with aside(work, idle=True) as result:  # type: ignore[arg-type]
        assert result() is None
    assert capfd.readouterr() == ("", "")


@forks
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
