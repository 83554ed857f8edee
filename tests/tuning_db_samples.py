"""Records to store, complete and small. Change what a test is about: ``trial(run, outcome=Outcome.WRONG)``."""

from dataclasses import dataclass, replace
from typing import Any

from tilewright.tuning_db.records import (
    ArtifactRecord,
    DeviceRecord,
    KernelRecord,
    Outcome,
    PlanEntry,
    PlanRecord,
    RunRecord,
    TrialRecord,
)
from tilewright.tuning_db.store import Store

DEVICE = DeviceRecord("cpu-1", "A processor", "x86_64", {"features": ["avx2", "fma"], "cache_bytes": {"l2": 524288}})
SIGNATURE = {"experts": 8, "top_k": 2, "hidden": 1024, "inter": 2048, "stage": "up"}


def trial(run_id: str, **changes: Any) -> TrialRecord:
    record = TrialRecord(
        run_id=run_id,
        op="moe_gemm",
        signature_key="signature-1",
        problem_key="problem-16",
        problem={**SIGNATURE, "tokens": 16},
        device_key=DEVICE.key,
        threads=2,
        template="cpu_blocked",
        config={"block_m": 4, "prefetch": True, "order": "mnk"},
        kernel_key="b" * 64,
        outcome=Outcome.OK,
        timing="measured",
        median_us=61.25,
        low_us=60.5,
        high_us=62.0,
        samples_us=(61.25, 60.5, 62.0),
        error=3e-7,
        seed=2**62,
        search="tpe",
        build_s=0.9,
        created_at=1.7e9,
    )
    return replace(record, **changes)


def failed_trial(run_id: str, outcome: Outcome, **changes: Any) -> TrialRecord:
    timeless: dict[str, Any] = {"timing": "none", "median_us": None, "low_us": None, "high_us": None, "samples_us": ()}
    return trial(run_id, outcome=outcome, message="segmentation fault", **timeless, **changes)


def artifact(data: bytes = b"\x7fELF" + bytes(range(256)) * 8) -> ArtifactRecord:
    return ArtifactRecord.from_bytes(data, kind="host_so", abi_version=1)


def kernel(*artifacts: ArtifactRecord, **changes: Any) -> KernelRecord:
    record = KernelRecord(
        key="a" * 64,
        op="moe_gemm",
        signature_key="signature-1",
        signature=SIGNATURE,
        template="cpu_blocked",
        config={"block_m": 4, "prefetch": True},
        arch="x86_64",
        source="// made by tilewright\nint run(void) { return 0; }\n",
        recipe={
            "launches": [{"artifact": 0, "entry": "run"}],
            "workspace": "tokens * 4",
            "guards": ["hidden % 8 == 0"],
        },
        toolchain="clang 19.1 -O3",
        facts={"registers": 16, "spills": 0, "share": 0.25},
        artifacts=tuple(each.checksum for each in artifacts),
        checked="compiled",
        created_at=1.7e9,
    )
    return replace(record, **changes)


def plan(kernel_key: str | None, **changes: Any) -> PlanRecord:
    record = PlanRecord(
        op="moe_gemm",
        signature_key="signature-1",
        signature=SIGNATURE,
        device_key=DEVICE.key,
        threads=2,
        model="mixtral-8x7b",
        layout="panels-8",
        precision="fp32",
        timing="measured",
        checked="device",
        entries=(
            PlanEntry(16, kernel_key, median_us=61.25, default_us=112.0, tuned_size=16),
            PlanEntry(None, None),
        ),
        facts={"probed": {"sizes": 4, "rounds": 1, "mended": [], "slower": []}, "layout_cost": 1.25},
        created_at=1.7e9,
    )
    return replace(record, **changes)


@dataclass(frozen=True)
class Filled:
    """What ``fill`` put into a database."""

    run: RunRecord
    artifacts: tuple[ArtifactRecord, ...]
    kernel: KernelRecord
    plan: PlanRecord
    trials: tuple[TrialRecord, ...]


def fill(store: Store) -> Filled:
    """Store at least one row of every kind."""
    store.put_device(DEVICE)
    run = store.start_run("tune --arch native", versions={"tilewright": "0.1.0"}, host="laptop")
    trials = [trial(run.id), *(failed_trial(run.id, each) for each in Outcome if each is not Outcome.OK)]
    ids = store.add_trials(trials)
    artifacts = (artifact(), artifact(b"a second object"))
    stored_kernel = kernel(*artifacts)
    store.add_kernel(stored_kernel, artifacts)
    stored_plan = plan(stored_kernel.key)
    store.put_plan(stored_plan)
    store.finish_run(run.id)
    with_ids = tuple(replace(each, id=number) for each, number in zip(trials, ids, strict=True))
    return Filled(run, artifacts, stored_kernel, stored_plan, with_ids)
