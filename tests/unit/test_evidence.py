"""Which plans may serve where: measured before predicted, and predicted ones on GPUs alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tilewright.codegen.hardware.cpu_info import read_cpu_info
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.errors import TilewrightError
from tilewright.runtime import ServeOptions, TilewrightWarning
from tilewright.runtime.launchers.cuda.driver import CudaDevice
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.serve.devices import EVIDENCE_VARIABLE, Gpu, Host, ServingDevice, device_of, serving_device
from tilewright.runtime.serve.plans import is_planned, resolve
from tilewright.tuning_db.records import DeviceRecord, PlanEntry, PlanRecord, Timing
from tilewright.tuning_db.store import Store

SIGNATURE = GatingSignature(experts=8, top_k=2)
CUDA = torch.device("cuda", 0)


class Launching(Gpu):
    """A device with a driver, of which nothing here asks more than its key."""

    def __init__(self) -> None:
        device = CudaDevice(0, "A card", (9, 0), 132, memory_bytes=80 << 30, smem_bytes_per_block=227 << 10, context=1)
        super().__init__(CUDA, device, object())  # type: ignore[arg-type]
        self.key = "a-card"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(EVIDENCE_VARIABLE, raising=False)
    forget_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TilewrightWarning)
        yield


def store(path: Path, device_key: str, timing: Timing, error: float = 0.0) -> None:
    with Store.open(path) as database:
        database.put_device(DeviceRecord(device_key, "test", "sm_90"))
        database.put_plan(
            PlanRecord(
                op=SIGNATURE.op,
                signature_key=SIGNATURE.key,
                signature=SIGNATURE.to_dict(),
                device_key=device_key,
                threads=0,
                layout="",
                timing=timing,
                checked="emulated",
                entries=(PlanEntry(None, None, 5.0, 9.0, 8),),
                precision="fp32",
                error=error,
            )
        )


def timing_of(path: Path, device: ServingDevice, **more: float) -> Timing | None:
    plan = resolve(SIGNATURE, device, ServeOptions(database=path, **more)).plan  # type: ignore[arg-type]
    return plan and plan.timing


def test_a_measured_plan_goes_before_a_predicted_one(tmp_path: Path) -> None:
    path, gpu = tmp_path / "tuning.db", Launching()
    store(path, gpu.key, "predicted")
    assert timing_of(path, gpu) == "predicted"
    store(path, gpu.key, "measured")
    assert timing_of(path, gpu) == "measured"


def test_a_predicted_plan_serves_where_the_measured_one_rounds_too_much(tmp_path: Path) -> None:
    path, gpu = tmp_path / "tuning.db", Launching()
    store(path, gpu.key, "measured", error=0.01)
    store(path, gpu.key, "predicted")
    assert timing_of(path, gpu) == "predicted"
    assert timing_of(path, gpu, max_error=0.02) == "measured"


def test_predicted_plans_can_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, gpu = tmp_path / "tuning.db", Launching()
    store(path, gpu.key, "predicted")
    monkeypatch.setenv(EVIDENCE_VARIABLE, "measured")
    resolution = resolve(SIGNATURE, gpu, ServeOptions(database=path))
    assert resolution.plan is None
    assert "were predicted, and $TILEWRIGHT_EVIDENCE asks for measured ones" in resolution.ranges[0].why_torch
    store(path, gpu.key, "measured")
    assert timing_of(path, gpu) == "measured"


def test_on_the_cpu_predicted_plans_never_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.db"
    store(path, read_cpu_info().key, "predicted")
    monkeypatch.setenv(EVIDENCE_VARIABLE, "predicted")
    assert timing_of(path, Host()) is None
    assert not is_planned(SIGNATURE, ServeOptions(database=path))


def test_evidence_that_there_is_none_of_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EVIDENCE_VARIABLE, "guessed")
    with pytest.raises(TilewrightError, match=r"\$TILEWRIGHT_EVIDENCE is 'guessed'; give measured, predicted or"):
        resolve(SIGNATURE, Launching(), ServeOptions(database=tmp_path / "none.db"))


def test_a_plan_of_another_product_does_not_serve(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    store(path, "h100-sxm", "predicted")
    (part,) = resolve(SIGNATURE, Launching(), ServeOptions(database=path)).ranges
    assert "made on other devices (h100-sxm), this one is a-card; run `tune --arch sm_90`" in part.why_torch


def test_where_nothing_can_be_launched_the_reason_is_said(tmp_path: Path) -> None:
    path, gpu = tmp_path / "tuning.db", Gpu(CUDA, None, None, "there is no driver")
    store(path, gpu.key, "measured")
    with pytest.warns(TilewrightWarning, match="served by plain torch: there is no driver"):
        assert resolve(SIGNATURE, gpu, ServeOptions(database=path)).plan is None
    assert gpu.describe(2) == "cuda:0"


def test_gpus_by_amd_are_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    device = serving_device(CUDA)
    with pytest.raises(TilewrightError, match="GPUs by AMD"):
        device.require_kernels()


def test_other_devices_are_refused() -> None:
    with pytest.raises(TilewrightError, match="nothing here serves tensors on meta"):
        serving_device(torch.device("meta"))


def test_weights_decide_where_calls_are_served() -> None:
    options = ServeOptions(device="cuda:1")
    assert device_of({}, options, "gating") == torch.device("cuda:1")
    assert device_of({"bias": torch.zeros(1)}, options, "gating") == torch.device("cpu")
    with pytest.raises(TilewrightError, match="gating: b is on meta and a on cpu; put all weights on one device"):
        device_of({"a": torch.zeros(1), "b": torch.zeros(1, device="meta")}, options, "gating")
