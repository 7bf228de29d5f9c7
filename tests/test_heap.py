"""What the C library keeps of freed memory goes back to the system."""

import platform
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from minivlm.training import heap, reporting
from minivlm.training.heap import trim_heap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system has no glibc")


@glibc
def test_free_blocks_between_used_ones_are_given_back():
    blocks = [torch.ones(25_000) for _ in range(4_000)]  # 400 MB in blocks that glibc takes from its heap
    kept = blocks[::20]
    del blocks
    before = psutil.Process().memory_info().rss
    assert trim_heap()
    assert before - psutil.Process().memory_info().rss > 200_000_000
    assert all(bool(block.eq(1).all()) for block in kept)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert trim_heap() is False
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: SimpleNamespace())  # musl has no malloc_trim
    assert trim_heap() is False


@pytest.mark.parametrize(("device", "expected"), [("cpu", [100, 200]), ("cuda", [])])
def test_a_run_trims_the_heap_that_holds_its_tensors(device, expected, monkeypatch):
    trimmed, state = [], SimpleNamespace(step=0)
    monkeypatch.setattr(reporting, "trim_heap", lambda: trimmed.append(state.step))
    reporter = object.__new__(reporting.Reporter)
    reporter.accelerator, reporter.state = SimpleNamespace(device=torch.device(device)), state
    reporter.bar, reporter.window = SimpleNamespace(update=lambda n: None), {"flops": 0, "padding": 0}
    reporter.flops, reporter.main = lambda *_: 0, False
    for state.step in range(1, 251):
        reporter.step(0, {"tokens": 0, "pictures": 0, "answers": 0, "padding": 0}, {})
    assert trimmed == expected
