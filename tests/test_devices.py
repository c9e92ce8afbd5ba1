"""What is known of devices: names, datasheets, limits, and timings of real products."""

from contextlib import nullcontext

import pytest
import torch

from chatmodel import devices
from chatmodel.devices import (
    DATASHEETS,
    choose_precision,
    describe_device,
    describe_named,
    find_datasheet,
    measure_copy,
    measure_matmul,
    time_repeated,
)
from chatmodel.runtime import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("h100", 989e12),
    ],
)
def test_a_device_is_known_by_part_of_its_name(name, flops):
    assert find_datasheet(name).flops == flops


def test_an_unknown_device_has_no_datasheet():
    assert find_datasheet("Voodoo 2") is None
    with pytest.raises(UserError, match=r"'Voodoo 2' is not known; choose one of H200.* RTX 3090"):
        describe_named("Voodoo 2")


def test_a_named_device_is_that_of_another_machine():
    device = describe_named("RTX 4090")
    assert (device.kind, device.present, device.memory_bytes) == ("cuda", None, DATASHEETS["RTX 4090"].memory_bytes)


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    whole = describe_device(CPU).memory_bytes
    limits = [tmp_path / name for name in ("memory.max", "not there", "word")]
    limits[0].write_text(f"{2**30}\n")
    limits[2].write_text("max\n")
    monkeypatch.setattr(devices, "CGROUP_LIMITS", limits)
    assert describe_device(CPU).memory_bytes == 2**30 < whole


def test_rates_are_those_of_the_clock(monkeypatch):
    """A clock that ticks once a look makes every call last one second."""
    ticks = iter(range(100))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: float(next(ticks)))
    assert measure_matmul(CPU, torch.float32, (8, 4, 2)) == 2 * 8 * 4 * 2
    assert measure_copy(CPU) == 2 * 4 * 2**24


@pytest.mark.parametrize(
    ("launched", "asked", "fast", "said"),
    [
        ("no", None, True, "precision: bf16 on cpu, not Accelerate's 'no', which does not count: this program's own"),
        ("bf16", None, False, "precision: fp32 on cpu, not Accelerate's 'bf16', which does not count: this"),
        ("fp16", None, False, "precision: fp32 on cpu, not Accelerate's 'fp16'"),
        ("no", None, False, "precision: fp32 on cpu\n"),
        (None, None, True, "precision: bf16 on cpu\n"),
        ("no", "bf16", False, ""),
    ],
)
def test_a_precision_asked_of_accelerate_is_not_passed_over_in_silence(
    monkeypatch, caplog, launched, asked, fast, said
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr("chatmodel.devices._has_fast_bf16", lambda: fast)
    with caplog.at_level("INFO", logger="chatmodel"):
        chosen = choose_precision(torch.device("cpu"), asked)
    assert chosen == (asked or ("bf16" if fast else "no"))
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


@pytest.mark.parametrize(
    ("found", "speedup", "chosen"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, 0.5, "bf16"),  # the clock was disturbed
        ({"avx512_bf16": False, "amx_bf16": True}, 0.5, "bf16"),
        ({"avx512_bf16": False}, 2.0, "no"),
        ({"architecture": "aarch64"}, 2.0, "bf16"),
        ({"architecture": "aarch64"}, 1.1, "no"),
    ],
)
def test_the_precision_on_a_cpu_is_by_its_instructions_where_they_are_known(monkeypatch, found, speedup, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr("chatmodel.devices._matmul_speedup", lambda dtype: speedup)
    assert choose_precision(CPU) == chosen


class FakeGPU:
    """A host that takes its time to hand a call over, and a GPU that works on calls one after the other."""

    def __init__(self, monkeypatch):
        self.host = self.gpu = 0.0
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(outer.gpu, outer.host)

            def synchronize(self):
                outer.wait()

            def elapsed_time(self, end):
                return 1000 * (end.at - self.at)

        monkeypatch.setattr(devices.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(cycles / devices.CYCLES_PER_SECOND))

    def wait(self):
        self.host = self.gpu = max(self.host, self.gpu)

    def work(self, seconds):
        self.gpu = max(self.gpu, self.host) + seconds


@pytest.mark.parametrize(("handing_over", "working"), [(0.004, 0.001), (0.001, 0.004)])
def test_a_gpu_is_timed_however_slow_its_host(monkeypatch, handing_over, working):
    gpu = FakeGPU(monkeypatch)

    def call():
        gpu.host += handing_over
        gpu.work(working)

    seconds = time_repeated(call, torch.device("cuda"), repeats=2)
    assert seconds == pytest.approx(working, rel=0.1)
