"""The registry: which implementation is chosen, what configuration can ask for, what it says."""

import ast
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fulmen.kernels import registry
from fulmen.kernels.common import why_not_triton
from fulmen.kernels.config import AUTO, IMPLEMENTATIONS, KernelsConfig
from fulmen.kernels.norm import rms_norm
from fulmen.kernels.registry import choose, configure

pytestmark = pytest.mark.fast

ON_GPU = ("triton", ""), ("torch", "")
ON_CPU = ("triton", "needs a CUDA tensor"), ("torch", "")


@pytest.fixture(autouse=True)
def untouched_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked for and nothing logged, before the test and for those after it."""
    monkeypatch.setattr(registry, "_overrides", {})
    monkeypatch.setattr(registry, "_logged", set())


class Kept(logging.Handler):
    """Keeps messages, whatever other tests did to the loggers of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the registry logs."""
    kept, log = Kept(), logging.Logger("kernels")
    log.addHandler(kept)
    monkeypatch.setattr(registry, "log", log)
    return kept.messages


def test_the_first_that_can_take_the_call_is_chosen() -> None:
    assert choose("norm", *ON_GPU) == "triton"
    assert choose("norm", *ON_CPU) == "torch"
    assert choose("grouped_gemm", ("grouped_mm", "no"), ("triton", ""), ("torch", "")) == "triton"


def test_the_order_is_the_caller_s() -> None:
    assert choose("attention", ("cudnn", ""), ("torch_varlen", "")) == "cudnn"
    assert choose("attention", ("torch_varlen", ""), ("cudnn", "")) == "torch_varlen"


def test_none_can_take_the_call() -> None:
    with pytest.raises(ValueError, match=r"^rope: triton: too long; torch: too short$"):
        choose("rope", ("triton", "too long"), ("torch", "too short"))


def test_configuration_overrides_the_order_of_one_op() -> None:
    configure({"norm": "torch"})
    assert choose("norm", *ON_GPU) == "torch"
    assert choose("rope", *ON_GPU) == "triton"
    configure({"norm": "triton", "rope": "torch"})
    assert choose("norm", *ON_GPU) == "triton"
    assert choose("rope", *ON_GPU) == "torch"


def test_auto_takes_a_request_back() -> None:
    configure({"norm": "torch", "rope": "torch"})
    configure({"norm": AUTO})
    assert choose("norm", *ON_GPU) == "triton"
    assert choose("rope", *ON_GPU) == "torch"


def test_an_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"^kernels\.nrom: no such op; there are ") as raised:
        configure({"nrom": "torch"})
    assert all(op in str(raised.value) for op in IMPLEMENTATIONS)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_an_unknown_implementation(op: str) -> None:
    known = ", ".join(IMPLEMENTATIONS[op])
    message = f"kernels.{op}=tritn: must be auto or one of {known}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        configure({op: "tritn"})
    assert choose(op, (IMPLEMENTATIONS[op][-1], "")) == IMPLEMENTATIONS[op][-1]


def test_a_configured_implementation_that_cannot_run_is_not_replaced() -> None:
    configure({"norm": "triton"})
    with pytest.raises(ValueError, match=r"^kernels\.norm=triton: needs a CUDA tensor$"):
        choose("norm", *ON_CPU)
    with pytest.raises(ValueError, match=r"^kernels\.norm=triton: needs a CUDA tensor$"):
        rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


def test_a_choice_is_logged_once(messages: list[str]) -> None:
    for _ in range(3):
        choose("norm", *ON_GPU)
        choose("rope", *ON_CPU)
    assert messages == ["kernels: norm runs on triton", "kernels: rope runs on torch"]
    # An op may change its mind from call to call: each implementation is told of once.
    choose("norm", *ON_CPU)
    choose("norm", *ON_GPU)
    assert messages[2:] == ["kernels: norm runs on torch"]


def test_a_configured_choice_is_logged_as_such(messages: list[str]) -> None:
    configure({"norm": "torch"})
    choose("norm", *ON_GPU)
    assert messages == ["kernels: norm runs on torch (configured)"]


def test_a_compiled_graph_holds_the_choice(messages: list[str]) -> None:
    def scaled(x: Tensor) -> Tensor:
        reason = "" if x.shape[0] < 3 else "needs fewer rows"
        return x * (2 if choose("norm", ("triton", reason), ("torch", "")) == "triton" else 3)

    compiled = torch.compile(scaled, fullgraph=True, backend="eager", dynamic=False)
    for _ in range(2):
        assert compiled(torch.ones(2)).tolist() == [2, 2]
        assert compiled(torch.ones(3)).tolist() == [3, 3, 3]
    assert messages == [
        "kernels: norm runs on triton",
        "kernels: norm runs on torch: triton needs fewer rows",
    ]


def test_a_compiled_op_follows_configuration(messages: list[str]) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def normed(x: Tensor) -> Tensor:
        return rms_norm(x, torch.ones(4), 0.0)

    configure({"norm": "torch"})
    torch.testing.assert_close(normed(torch.full((2, 4), 3.0)), torch.ones(2, 4))
    assert messages == ["kernels: norm runs on torch (configured)"]


def test_why_not_triton() -> None:
    with FakeTensorMode():  # which has a GPU on every machine
        low, wide = (
            torch.empty(2, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float64)
        )
        assert why_not_triton(low, low.float()) == ""
        assert why_not_triton(low, wide) == "needs bf16 or fp32"
        assert why_not_triton(low, low.cpu()) == "needs a CUDA tensor"
        assert why_not_triton(wide.cpu()) == "needs a CUDA tensor"


def test_every_key_has_its_implementations() -> None:
    defaults = {item.name: item.default for item in fields(KernelsConfig)}
    assert list(defaults) == list(IMPLEMENTATIONS)
    assert set(defaults.values()) == {AUTO}
    assert all(len(set(names)) == len(names) >= 2 for names in IMPLEMENTATIONS.values())
    assert all(AUTO not in names for names in IMPLEMENTATIONS.values())


def calls_of_choose(path: Path) -> list[Any]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "id", "") == "choose"]


def test_every_op_asks_the_registry_and_its_reference_takes_every_call() -> None:
    asked = set()
    for path in (ROOT / "kernels").glob("*/*.py"):
        for call in calls_of_choose(path):
            op, *candidates = call.args
            asked.add(op.value)
            if op.value in ("attention", "attention_block"):  # their order depends on the call
                continue
            names = tuple(candidate.elts[0].value for candidate in candidates)
            assert names == IMPLEMENTATIONS[op.value], path
            assert (names[-1], candidates[-1].elts[1].value) == ("torch", ""), path
    assert asked == set(IMPLEMENTATIONS)
