"""How ranks are joined, whatever their devices: nothing here touches one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

from lightning_dgl.distributed import connect


def options_of_group(device: str, backend: str | None) -> tuple[str, dict[str, Any]]:
    """What the process group of all ranks is made with."""
    with mock.patch.object(connect, "init_process_group") as init:
        connect.init_ranks(LightningEnvironment(), torch.device(device), backend, timedelta(seconds=5))
    (_, backend), options = init.call_args
    return backend, options


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", None, "gloo"),
        ("cuda:1", None, "cpu:gloo,cuda:nccl"),
        ("cuda:1", "nccl", "cpu:gloo,cuda:nccl"),
        ("cuda:1", "gloo", "gloo"),
        ("cuda:1", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl"),
    ],
)
def test_all_ranks_also_exchange_what_is_in_the_hosts_memory(device: str, given: str | None, expected: str) -> None:
    with mock.patch.dict(os.environ):
        backend, options = options_of_group(device, given)
    assert backend == expected
    # Bound to a device, the group could not have a part with gloo, and every group would be made by all ranks.
    assert set(options) == {"timeout"}


def test_nccl_neither_ends_the_process_nor_warns_of_what_cannot_happen() -> None:
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING")
    with mock.patch.dict(os.environ, {names[0]: "3"}):
        options_of_group("cpu", None)
        assert names[1] not in os.environ
        options_of_group("cuda:0", None)
        assert [os.environ[name] for name in names] == ["3", "false"]
        del os.environ[names[0]]
        options_of_group("cuda:0", None)
        assert os.environ[names[0]] == "0"


def test_devices_that_cannot_send_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Several ranks train on CPUs or CUDA devices, but .*accelerator='mps'"):
        options_of_group("mps:0", None)
