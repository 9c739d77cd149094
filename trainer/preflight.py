"""What a node says about itself before training, and which nodes are bad.

Nothing here touches CUDA: what measures (preflight_exchange.py) is forked.
"""

import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fulmen.parallel.rendezvous import source_digest
from fulmen.trainer.preflight_config import PreflightConfig

Faults = dict[str, list[str]]
"""What is wrong, by node."""
GIB = 2**30
_PROBE_BYTES = 32 * 2**20
"""Written and read back on each node."""
_PACKAGES = ("torch", "triton", "numpy", "hydra-core", "safetensors", "tokenizers")
_QUERY = (
    "index,name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,"
    "pcie.link.width.current,{}.hw_slowdown"
)
_SLOWDOWN = ("clocks_event_reasons", "clocks_throttle_reasons")
"""What newer and older drivers call it."""
_SLOW_GPU, _SLOW_LINK = 0.85, 0.5
"""Of the median over all nodes; what is below is bad."""


def facts_of_node(config: PreflightConfig) -> dict[str, Any]:
    """What this machine is, and `faults`: what is wrong with it whatever the others are."""
    gpus, faults = ([], []) if config.gpus == 0 else list_gpus()
    faults += faults_of_gpus(gpus, config)
    speed = 0.0
    try:
        speed = write_speed(Path(config.folder))
        free = shutil.disk_usage(config.folder).free / GIB
        if speed < config.min_write_mb_per_s:
            faults.append(
                f"writes {speed:.1f} MB/s to {config.folder}, min_write_mb_per_s is "
                f"{config.min_write_mb_per_s:g}"
            )
        if free < config.min_free_gib:
            faults.append(f"{config.folder} has {free:.2f} GiB left")
    except OSError as error:
        faults.append(f"{config.folder} cannot be written: {error.strerror or error}")
    if config.cache_folder:
        folder = os.path.expandvars(config.cache_folder)
        try:
            write_speed(Path(folder), size=4096)
        except OSError as error:
            faults.append(f"cache_folder {folder} cannot be written: {error.strerror or error}")
    return {
        "host": socket.gethostname(),
        "versions": versions() | ({"driver": gpus[0]["driver"]} if gpus else {}),
        "gpus": gpus,
        "write_mb_per_s": round(speed, 1),
        "faults": faults,
    }


def versions() -> dict[str, str]:
    """Of all that has to be equal on all nodes."""
    found = {"python": platform.python_version(), "fulmen": source_digest()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def list_gpus() -> tuple[list[dict[str, Any]], list[str]]:
    """The GPUs that nvidia-smi and CUDA_VISIBLE_DEVICES show, if any, and faults."""
    if shutil.which("nvidia-smi") is None:
        return [], []
    for reasons in _SLOWDOWN:
        query = f"--query-gpu={_QUERY.format(reasons)}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            return [], ["nvidia-smi does not answer within 60 s"]
        if done.returncode == 0:
            break
    else:
        return [], [f"nvidia-smi fails: {(done.stdout + done.stderr).strip()[:200]}"]
    gpus = [parse_gpu(line) for line in done.stdout.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        shown = [word.strip() for word in visible.split(",") if word.strip()]
        if all(word.isdigit() for word in shown):
            gpus = [gpu for gpu in gpus if gpu["index"] in shown]
    return gpus, []


def parse_gpu(line: str) -> dict[str, Any]:
    """A line of nvidia-smi; what the chip does not tell is None."""
    index, name, driver, total, used, ecc, width, slowed = (
        word.strip() for word in line.split(",")
    )
    return {
        "index": index,
        "name": name,
        "driver": driver,
        "memory_gib": _number(total) and round((_number(total) or 0) / 1024, 1),
        "used_gib": _number(used) and round((_number(used) or 0) / 1024, 2),
        "ecc_errors": _number(ecc),
        "slowed": slowed == "Active",
        "pcie_width": _number(width),
    }


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def faults_of_gpus(gpus: list[dict[str, Any]], config: PreflightConfig) -> list[str]:
    """What is wrong with a node's GPUs."""
    wanted = config.gpus
    faults = []
    if wanted is not None and len(gpus) != wanted:
        faults.append(f"{len(gpus)} GPU(s) instead of {wanted}")
    if len({gpu["name"] for gpu in gpus}) > 1:
        faults.append(f"unlike GPUs: {', '.join(gpu['name'] for gpu in gpus)}")
    for gpu in gpus:
        who = f"GPU {gpu['index']}"
        if gpu["ecc_errors"]:
            faults.append(f"{who}: {gpu['ecc_errors']:.0f} uncorrected ECC errors since its reset")
        if gpu["slowed"]:
            faults.append(f"{who}: its clocks are slowed down by the hardware")
        if (gpu["used_gib"] or 0) > config.max_used_gib:
            faults.append(f"{who}: {gpu['used_gib']:.1f} GiB of its memory are in use")
    return faults


def write_speed(folder: Path, *, size: int = _PROBE_BYTES) -> float:
    """MB/s of a new file with its fsync, which is read back and compared; `OSError` if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    content = os.urandom(size)
    path = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        if path.read_bytes() != content:
            raise OSError(f"what was written to {path} reads back as something else")
    finally:
        path.unlink(missing_ok=True)
    return size / 1e6 / seconds


def judge_facts(facts: Mapping[str, Mapping[str, Any] | None], address: str | None) -> Faults:
    """What is wrong with each bad node, by what all of them said; None stands for silence.

    The first name is the node that the others meet at.
    """
    bad: Faults = {}
    present = {node: said for node, said in facts.items() if said is not None}
    for node, said in facts.items():
        if said is None:
            _add(bad, node, f"did not come to {address or 'the first node'}: see its output")
        else:
            for fault in said["faults"]:
                _add(bad, node, fault)
    for key in dict.fromkeys(key for said in present.values() for key in said["versions"]):
        values = {node: said["versions"].get(key, "absent") for node, said in present.items()}
        _name_odd(bad, key, values)
    for key, name in (("GPUs", "name"), ("PCIe width", "pcie_width")):
        kinds = {node: _kinds(said["gpus"], name) for node, said in present.items()}
        _name_odd(bad, key, kinds)
    hosts = {said["host"] for said in present.values()}
    if len(facts) > 1 and len(hosts | {None} if None in facts.values() else hosts) > 1:
        own = _loopback(address)
        if own:
            first = next(iter(facts))
            _add(bad, first, f"address {address} is {own}, which other machines cannot reach")
    return bad


def _kinds(gpus: list[dict[str, Any]], key: str) -> str:
    names = Counter(gpu[key] for gpu in gpus)
    return ", ".join(f"{count} x {name}" for name, count in names.items()) or "none"


def _name_odd(bad: Faults, key: str, values: Mapping[str, str]) -> None:
    """Name the nodes whose value is not the most common one; the first node's wins a tie."""
    if len(set(values.values())) < 2:
        return
    usual, _ = Counter(values.values()).most_common(1)[0]  # of equals, the one met first
    for node, value in values.items():
        if value != usual:
            _add(bad, node, f"{key} is {value}, elsewhere {usual}")


def _loopback(address: str | None) -> str:
    try:
        found = socket.gethostbyname(address or "")
    except OSError:
        return ""
    return found if found.startswith("127.") else ""


def _add(bad: Faults, node: str, fault: str) -> None:
    bad.setdefault(node, []).append(fault)


def judge_measures(
    measures: Mapping[str, Mapping[str, Any] | None], config: PreflightConfig
) -> Faults:
    """What is wrong by what the nodes measured; None for a node whose processes gave no result.

    A node's measures: `failure` ('' or why there are none), `reached` (number of the measurement
    it came to), `name` of that, and with no failure `clock` (s), `on_gpu`, `tflops` and
    `checksums` by process, `node` and `pairs` (GB/s of an all-reduce within the node, and with
    the one before and after it), `all_reduce` and `all_to_all` (GB/s over all).
    """
    bad: Faults = {}
    failed = {node: one for node, one in measures.items() if one is None or one["failure"]}
    if failed:
        reached = {node: -1 if one is None else one["reached"] for node, one in failed.items()}
        for node, one in failed.items():
            # Who came less far than the others is what they waited for.
            if reached[node] == min(reached.values()):
                text = "no result" if one is None else f"{one['failure']} (in {one['name']})"
                _add(bad, node, text)
        return bad
    good = {node: one for node, one in measures.items() if one is not None}
    middle = statistics.median(one["clock"] for one in good.values())
    for node, one in good.items():
        skew = one["clock"] - middle
        if abs(skew) > config.max_clock_skew_s:
            _add(bad, node, f"its clock is {skew:+.1f} s off the others'")
    if all(one["on_gpu"] for one in good.values()):
        _judge_gpus(bad, good)
    one = next(iter(good.values()))
    for key, least in (
        ("all_reduce", config.min_all_reduce_gb_per_s),
        ("all_to_all", config.min_all_to_all_gb_per_s),
    ):
        if one[key] is not None and one[key] < least:
            for node in good:
                _add(bad, node, f"{key} over all nodes: {one[key]:.1f} GB/s, least {least:g}")
    return bad


def _judge_gpus(bad: Faults, good: Mapping[str, Mapping[str, Any]]) -> None:
    median = statistics.median(rate for one in good.values() for rate in one["tflops"])
    sums = Counter(value for one in good.values() for value in one["checksums"])
    usual, times = sums.most_common(1)[0]
    most_agree = 2 * times > sums.total()
    node_median = statistics.median(one["node"] or 0 for one in good.values())
    links = [rate for one in good.values() for rate in one["pairs"]]
    for node, one in good.items():
        for index, rate in enumerate(one["tflops"]):
            if rate < _SLOW_GPU * median:
                text = f"GPU {index} multiplies at {rate:.0f} TFLOP/s, the median is {median:.0f}"
                _add(bad, node, text)
        for index, value in enumerate(one["checksums"]):
            if most_agree and value != usual:
                _add(bad, node, f"GPU {index} computes another product than the others")
        if (one["node"] or 0) < _SLOW_LINK * node_median:
            text = f"all-reduce inside: {one['node']:.0f} GB/s, the median is {node_median:.0f}"
            _add(bad, node, text)
        slow = [rate for rate in one["pairs"] if rate < _SLOW_LINK * statistics.median(links)]
        # With both neighbours; a good node next to it is slow with one.
        if slow and len(slow) == len(one["pairs"]):
            text = f"all-reduce with its neighbours: {max(slow):.1f} GB/s"
            _add(bad, node, f"{text}, the median is {statistics.median(links):.1f}")
