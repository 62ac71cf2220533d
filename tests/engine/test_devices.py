"""Which devices the engine process sees, and what is said of those that are not there."""

import pytest
import torch

from engine.client import engine_environment
from engine.config import EngineConfig
from engine.model_runner import check_devices
from engine.models.registry import UnsupportedModelError


def test_the_engine_process_sees_the_chosen_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")

    assert engine_environment(EngineConfig(model_folder="", gpus=("2", "3"), tp=2))["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert engine_environment(EngineConfig(model_folder=""))["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_devices_that_are_not_there_are_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"--gpus: this torch finds no CUDA device .*--only-cpu"):
        check_devices(EngineConfig(model_folder="", device="cuda", gpus=("0",)))

    check_devices(EngineConfig(model_folder="", tp=2))


def test_more_devices_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(UnsupportedModelError, match="--gpus 0,7: only 1 CUDA devices are there"):
        check_devices(EngineConfig(model_folder="", device="cuda", gpus=("0", "7"), tp=2))
    check_devices(EngineConfig(model_folder="", device="cuda", gpus=("0",)))


def test_kernels_are_kept_for_few_shapes_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")

    environment = engine_environment(EngineConfig(model_folder=""))

    assert int(environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
    assert environment["LRU_CACHE_CAPACITY"] == "7"
