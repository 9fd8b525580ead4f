"""What a rank exchanges with the others, on any device: here it is alone, or does not get an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_dgl.distributed import DistributedStage, Groups, RankFailedError, Topology
from tests.distributed.conftest import Watchdogs

CPU = torch.device("cpu")


@pytest.fixture
def stage(watch: Watchdogs) -> Iterator[DistributedStage]:
    """The stage of the only rank of a run."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    groups = Groups.make(1, 1, CPU, "gloo", timedelta(seconds=5))
    (watchdog,) = watch(0, store=store)
    yield DistributedStage([range(2)], groups, store, watchdog)
    dist.destroy_process_group()


class Remote(Tensor):
    """A tensor on another device, until it is copied to the host. (A fake device would let no later test fork.)"""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(Tensor) if func is Tensor.cpu else result


EXCHANGES: dict[str, Callable[[DistributedStage, Any], Any]] = {
    "gather": lambda stage, value: stage.gather(value),
    "merge on rank 0": lambda stage, value: stage.merge_on_rank_0(value),
    "agree": lambda stage, value: stage.agree(value),
    "from last stage": lambda stage, value: stage.from_last_stage(value),
}


@pytest.mark.parametrize("how", EXCHANGES)
def test_no_rank_gets_a_tensor_on_the_device_of_another(how: str, stage: DistributedStage) -> None:
    pickled: list[Any] = []
    to_bytes = dist.distributed_c10d._object_to_tensor

    def note(value: Any, *arguments: Any) -> Any:
        pickled.append(value)
        return to_bytes({}, *arguments)

    value = {"loss": torch.zeros(()).as_subclass(Remote), "names": ["a", (torch.ones(2).as_subclass(Remote), 3)]}
    with mock.patch.object(dist.distributed_c10d, "_object_to_tensor", note):
        EXCHANGES[how](stage, value)
    (sent,) = pickled
    loss, (name, (ones, number)) = sent["loss"], sent["names"]
    assert [(type(tensor), tensor.tolist()) for tensor in (loss, ones)] == [(Tensor, 0), (Tensor, [1, 1])]
    assert (name, number) == ("a", 3)


@pytest.mark.parametrize("how", EXCHANGES)
def test_values_are_exchanged_unchanged(how: str, stage: DistributedStage) -> None:
    value = {0: torch.ones(2, dtype=torch.bfloat16), 1: ["a", (None, 3)]}
    received = EXCHANGES[how](stage, value)
    if isinstance(received, list):
        (received,) = received
    assert torch.equal(received[0], value[0])  # type: ignore[arg-type]
    assert received[1] == value[1]


def test_a_default_device_does_not_reach_what_the_host_exchanges(stage: DistributedStage) -> None:
    weights = [torch.ones(2, 3), torch.zeros(1, dtype=torch.int64)]
    with torch.device("meta"):
        stage.meet("to save")
        stage.broadcast(weights, src=0)
        stage.topology.__dict__["rank"] = 1  # so that it receives
        stage.broadcast(weights, src=0)
        groups = Groups.make(1, 1, CPU, "gloo", timedelta(seconds=5))
    assert groups.mesh.mesh.device == CPU


def test_metrics_of_replicas_meet_under_the_watchdog(watch: Watchdogs, monkeypatch: pytest.MonkeyPatch) -> None:
    dogs = watch(0, 1)
    groups: Any = SimpleNamespace(topology=Topology(0, num_replicas=2, num_stages=1), data="the other replica")
    stage = DistributedStage([range(2)], groups, dist.HashStore(), dogs[0])
    metric = MeanMetric(distributed_available_fn=lambda: True)
    stage.synchronise(metric)
    metric.update(3.0)

    def gather(value: Tensor, group: Any) -> list[Tensor]:
        assert group == "the other replica"
        return [value, 2 * value]

    monkeypatch.setattr("lightning_dgl.distributed.stage.gather_all_tensors", gather)
    assert metric.compute() == 9 / 3  # weights are gathered, too

    def break_down(*_: Any) -> None:
        dogs[1].report(ZeroDivisionError("the culprit"))
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("lightning_dgl.distributed.stage.gather_all_tensors", break_down)
    metric.update(4.0)
    with pytest.raises(RankFailedError, match="Rank 1 failed; "):
        metric.compute()


# Waiting for a device


class Device:
    """Stands in for torch.cuda; its kernels are done when told so."""

    def __init__(self) -> None:
        self.is_done = threading.Event()

    def Event(self) -> Any:
        return SimpleNamespace(record=lambda: None, query=self.is_done.is_set)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    return device


def test_a_wait_for_a_device_ends_with_its_work(watch: Watchdogs, device: Device) -> None:
    (watchdog,) = watch(0, num_ranks=2)
    threading.Timer(0.1, device.is_done.set).start()
    watchdog.wait_for_device(torch.device("cuda:0"), "to average gradients")
    assert device.is_done.is_set()
    watchdog.wait_for_device(CPU, "to average gradients")


def test_a_wait_for_a_device_ends_when_another_rank_fails(watch: Watchdogs, device: Device) -> None:
    dogs = watch(0, 1)
    dogs[1].report(ZeroDivisionError("the culprit"))
    with pytest.raises(RankFailedError, match=r"Rank 1 failed; (.|\n)*the culprit"):
        dogs[0].wait_for_device(torch.device("cuda:0"), "to average gradients")


def test_a_wait_for_a_device_blames_the_rank_that_does_not_join_in(watch: Watchdogs, device: Device) -> None:
    dogs = watch(0, 1, 2, timeout=0.3)

    def wait(rank: int) -> None:
        with pytest.raises((RankFailedError, SystemExit)):
            dogs[rank].wait_for_device(torch.device("cuda:0"), "to average gradients")

    other = threading.Thread(target=wait, args=(2,))
    other.start()
    with pytest.raises(RankFailedError, match=r"Rank 1 hangs; .* 0\.3 s for the other ranks, to average gradients"):
        dogs[0].wait_for_device(torch.device("cuda:0"), "to average gradients")
    other.join()
