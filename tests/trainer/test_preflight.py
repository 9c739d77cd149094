"""Which nodes a preflight calls bad, and why."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.worlds import free_port, run_processes

import fulmen.launch.preflight as preflight_command
import fulmen.trainer.preflight as preflight_of_nodes
import fulmen.trainer.preflight_exchange as exchange
from fulmen.launch.preflight import describe, preflight
from fulmen.trainer.preflight import (
    facts_of_node,
    faults_of_gpus,
    judge_facts,
    judge_measures,
    parse_gpu,
)
from fulmen.trainer.preflight_config import PreflightConfig, check_preflight

fast = pytest.mark.fast
NAMES = ["a", "b", "c"]
LINE = "0, NVIDIA H100 80GB HBM3, 580.1, 81559, 14, 0, 16, Not Active"


def said(**changes: Any) -> dict[str, Any]:
    gpus = [parse_gpu(LINE), parse_gpu(LINE)]
    facts = {"host": "h", "versions": {"torch": "2.13"}, "gpus": gpus, "faults": []}
    return facts | changes


def measured(**changes: Any) -> dict[str, Any]:
    values = {
        "failure": "",
        "reached": 4,
        "name": "over all nodes",
        "on_gpu": True,
        "clock": 100.0,
        "tflops": [700.0, 700.0],
        "checksums": ["x", "x"],
        "node": 300.0,
        "pairs": [90.0, 91.0],
        "all_reduce": 80.0,
        "all_to_all": 40.0,
    }
    return values | changes


@fast
def test_like_nodes_are_good() -> None:
    assert judge_facts({name: said() for name in NAMES}, "10.0.0.1") == {}
    assert judge_measures({name: measured() for name in NAMES}, PreflightConfig()) == {}


@fast
def test_the_odd_one_is_named() -> None:
    facts = {name: said() for name in NAMES}
    facts["c"] = said(versions={"torch": "2.12"})
    assert judge_facts(facts, "x") == {"c": ["torch is 2.12, elsewhere 2.13"]}
    # Of two, the first one is believed.
    assert list(judge_facts({"c": facts["c"], "a": facts["a"]}, "x")) == ["a"]
    [fault] = judge_facts(facts | {"c": said(gpus=[])}, "x")["c"][:1]
    assert fault == "GPUs is none, elsewhere 2 x NVIDIA H100 80GB HBM3"


@fast
def test_a_node_that_does_not_come_is_named() -> None:
    bad = judge_facts({"a": said(), "b": None, "c": said()}, "10.0.0.1")
    assert list(bad) == ["b"]
    assert "did not come to 10.0.0.1" in bad["b"][0]


@fast
def test_an_address_of_the_machine_itself_is_named() -> None:
    facts = {"a": said(host="h1"), "b": said(host="h2")}
    assert "127.0.0.1, which other machines cannot reach" in judge_facts(facts, "127.0.0.1")["a"][0]
    facts["b"] = None
    assert set(judge_facts(facts, "localhost")) == {"a", "b"}
    assert judge_facts({"a": said(), "b": said()}, "127.0.0.1") == {}  # all on one machine


@fast
@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (LINE.replace(", 0, 16", ", 3, 16"), "GPU 0: 3 uncorrected ECC errors"),
        (LINE.replace("Not Active", "Active"), "slowed down by the hardware"),
        (LINE.replace(", 14,", ", 40960,"), "40.0 GiB of its memory are in use"),
        (LINE.replace("H100", "A100"), "unlike GPUs"),
    ],
)
def test_a_sick_gpu_is_named(line: str, fault: str) -> None:
    config = PreflightConfig(gpus=2)
    assert faults_of_gpus([parse_gpu(LINE), parse_gpu(LINE)], config) == []
    assert fault in "; ".join(faults_of_gpus([parse_gpu(line), parse_gpu(LINE)], config))


@fast
def test_a_missing_gpu_and_a_quiet_one() -> None:
    quiet = parse_gpu(LINE.replace(", 0, 16", ", [N/A], [N/A]"))
    assert faults_of_gpus([quiet], PreflightConfig(gpus=2)) == ["1 GPU(s) instead of 2"]


@fast
def test_slow_and_wrong_gpus_and_links_are_named() -> None:
    config = PreflightConfig()
    names = [f"n{i}" for i in range(6)]
    good = {name: measured() for name in names}
    slow = judge_measures(good | {"n2": measured(tflops=[700.0, 400.0])}, config)
    assert slow == {"n2": ["GPU 1 multiplies at 400 TFLOP/s, the median is 700"]}
    wrong = judge_measures(good | {"n2": measured(checksums=["y", "x"])}, config)
    assert wrong == {"n2": ["GPU 0 computes another product than the others"]}
    inside = judge_measures(good | {"n2": measured(node=100.0)}, config)
    assert "all-reduce inside: 100 GB/s" in inside["n2"][0]
    # A slow node slows the exchanges with it of both neighbours, who are good.
    links = {"n1": [90.0, 10.0], "n2": [10.0, 10.0], "n3": [10.0, 90.0]}
    linked = judge_measures(good | {n: measured(pairs=p) for n, p in links.items()}, config)
    assert list(linked) == ["n2"]


@fast
def test_clocks_and_least_rates() -> None:
    late = {name: measured() for name in NAMES} | {"b": measured(clock=110.0)}
    assert judge_measures(late, PreflightConfig()) == {
        "b": ["its clock is +10.0 s off the others'"]
    }
    rates = judge_measures(
        {name: measured() for name in NAMES}, PreflightConfig(min_all_to_all_gb_per_s=50)
    )
    assert list(rates) == NAMES
    assert "all_to_all over all nodes: 40.0 GB/s" in rates["a"][0]


@fast
def test_who_hangs_first_is_named() -> None:
    stuck = {"failure": "no result in time", "reached": 3, "name": "with a neighbour"}
    first = {"failure": "no result in time", "reached": 1, "name": "work"}
    bad = judge_measures({"a": stuck, "b": first, "c": stuck}, PreflightConfig())
    assert bad == {"b": ["no result in time (in work)"]}


@fast
def test_the_lines_for_a_person() -> None:
    one = said(write_mb_per_s=100.0)
    report = {"facts": {"a": one, "b": one}, "seconds": 2.0}
    report["measures"] = {"a": measured(), "b": measured(all_reduce=None)}
    lines = describe(["a", "b"], {}, report)
    assert lines[0] == "a (h): 2 x NVIDIA H100 80GB HBM3, writes 100.0 MB/s"
    assert "a: 700, 700 TFLOP/s; all-reduce inside 300.00 GB/s" in lines
    assert lines[-1] == "preflight: 2 good node(s), 2.0 s"
    # Whatever is missing, those that are bad are named.
    report["measures"] = {"a": {"failure": "x", "reached": 0, "name": "start"}, "b": None}
    report["facts"]["b"] = None
    lines = describe(["a", "b"], {"b": ["no result"]}, report)
    assert lines[-2:] == ["b is bad: no result", "preflight: 1 of 2 node(s) are bad, 2.0 s"]


@fast
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = PreflightConfig(folder=f"{tmp_path}/file/runs", cache_folder=f"{tmp_path}/$NODE/c")
    os.environ["NODE"] = "file"
    faults = facts_of_node(config)["faults"]
    del os.environ["NODE"]
    assert faults == [
        f"{tmp_path}/file/runs cannot be written: Not a directory",
        f"cache_folder {tmp_path}/file/c cannot be written: Not a directory",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@fast
def test_wrong_keys_are_named() -> None:
    with pytest.raises(ValueError, match="address is missing"):
        check_preflight(PreflightConfig(nodes=["a", "b"]))
    with pytest.raises(ValueError, match="twice"):
        check_preflight(PreflightConfig(nodes=["a", "a"], address="x"))


def test_what_measures_has_no_copy_of_a_lock_that_a_thread_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = threading.Lock()

    def measure(tell: Callable[[int], None], limit_s: float) -> dict[str, Any]:
        if not lock.acquire(timeout=limit_s):
            raise TimeoutError("nobody lets go of the lock")
        return {"clock": 1.0, "tflops": 0.0, "checksum": ""} | dict.fromkeys(
            ("node", "pairs", "all_reduce", "all_to_all")
        )

    monkeypatch.setattr(exchange, "_measure", measure)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with exchange.NodeMeasurer() as measurer, lock:
        measures = measurer.measure(0, 1, 2, on_gpu=False, limit_s=60.0)
    assert measures["failure"] == ""
    assert measures["tflops"] == [0.0, 0.0]
    with exchange.NodeMeasurer() as measurer:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        assert "died" in measurer.measure(0, 1, 2, on_gpu=False, limit_s=60.0)["failure"]


def test_what_measures_is_forked_before_the_store_has_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OpenedError(Exception):
        pass

    def open_store(*_: Any, **__: Any) -> None:
        assert len(multiprocessing.active_children()) == 1
        raise OpenedError

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    monkeypatch.setattr(preflight_command, "open_store", open_store)
    with pytest.raises(OpenedError):
        preflight(PreflightConfig())
    assert not multiprocessing.active_children()


def take_part(config: PreflightConfig) -> int:
    """The command as one of two nodes: like ones, then the second with other packages."""
    codes = 0
    for case in ("good", "bad"):
        if (case, config.rank) == ("bad", 1):
            preflight_of_nodes.versions = lambda: {"numpy": "1.0"}
        output = f"{config.output}/{case}"
        try:
            preflight(replace(config, output=output, port=config.port + (case == "bad")))
        except SystemExit as error:
            codes += int(error.code or 0)
    return codes


@pytest.mark.slow
def test_two_nodes_meet_measure_and_judge(tmp_path: Path) -> None:
    common = {"nodes": ["a", "b"], "address": "127.0.0.1", "port": free_port(), "processes": 2}
    folders = {"folder": str(tmp_path), "output": str(tmp_path)}
    configs = [PreflightConfig(**common, **folders, rank=rank, meeting_s=60) for rank in range(2)]
    environments = [{"RANK": f"{rank}", "WORLD_SIZE": "2"} for rank in range(2)]
    codes = run_processes(take_part_as, environments, configs)
    assert codes == [3, 3]
    good, bad = (json.loads((tmp_path / c / "preflight.json").read_text()) for c in ("good", "bad"))
    assert good["bad"] == {}
    assert good["measures"]["b"]["all_to_all"] > 0
    assert (tmp_path / "good" / "bad_nodes").read_text() == ""
    assert "numpy is 1.0, elsewhere" in "; ".join(bad["bad"]["b"])
    assert "measures" not in bad
    assert (tmp_path / "bad" / "bad_nodes").read_text() == "b\n"


def take_part_as(configs: list[PreflightConfig]) -> int:
    return take_part(configs[int(os.environ["RANK"])])
