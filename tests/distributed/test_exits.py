"""What a rank leaves to do for the moment when Python shuts down."""

from __future__ import annotations

import atexit
import signal
import time

import pytest
import torch.distributed as dist

from lightning_dgl.distributed import exits
from tests.distributed.jobs import Job


def shut_down_in_vain(outcomes: list[str]) -> None:
    """Let a process that has had these outcomes exit, and be kept from it."""
    exits.GRACE = 1.0  # type: ignore[misc]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for outcome in outcomes:
        {"success": exits.after_success, "failure": exits.after_failure}[outcome]()
    atexit._run_exitfuncs()
    print("destroyed" if not dist.is_initialized() else "left as they are", flush=True)
    if "failure" in outcomes:
        time.sleep(10_000)  # as a destructor may, which lets no other thread run


@pytest.mark.parametrize(
    ("outcomes", "code", "groups"),
    [
        ([], 0, "left as they are"),
        (["success"], 0, "destroyed"),
        (["failure"], -signal.SIGALRM, "left as they are"),
        (["success", "failure"], -signal.SIGALRM, "left as they are"),
    ],
)
def test_the_exit(outcomes: list[str], code: int, groups: str, job: Job) -> None:
    job.start(shut_down_in_vain, outcomes=outcomes)
    outcome = job.wait()
    assert outcome.codes == [code], str(outcome)
    assert groups in outcome.output
