"""Look at all nodes before training: `preflight.py` alone, or once on each node of a job.

Ends with status 3, and names the nodes, if some are bad. The job script of launch/submit.py runs
it before each start; docs/operations.md says what is looked at.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulmen.launch.hydra_main import run_hydra
from fulmen.parallel.rendezvous import open_store
from fulmen.trainer.preflight import Faults, facts_of_node, judge_facts, judge_measures
from fulmen.trainer.preflight_config import PreflightConfig, check_preflight
from fulmen.trainer.preflight_exchange import NodeMeasurer

BAD_NODES = 3
"""Exit status."""
_OPENED_S = 60.0
"""For the first node to listen, beyond the time for all to come."""


def preflight(config: PreflightConfig) -> None:
    """Check this node, and as the first one judge all."""
    check_preflight(config)
    names = config.nodes or [os.environ.get("SLURMD_NODENAME") or socket.gethostname()]
    rank = config.rank
    if rank is None:
        rank = int(os.environ.get("SLURM_NODEID", "0")) if len(names) > 1 else 0
    if rank >= len(names):
        raise ValueError(f"SLURM_NODEID={rank}, but nodes has {len(names)} names")
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ["MASTER_ADDR"] = config.address or "127.0.0.1"
    os.environ["MASTER_PORT"] = str(config.port if len(names) > 1 else _free_port())
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(names))}  # for messages
    started = time.monotonic()
    with NodeMeasurer() as measurer:
        bad, report = Meeting(config, names, rank, measurer).hold()
    if rank == 0:
        report |= {"seconds": round(time.monotonic() - started, 1), "bad": bad}
        _write(config, bad, report)
        for line in describe(names, bad, report):
            print(line, flush=True)
    elif names[rank] in bad:
        print(f"{names[rank]} is bad: {'; '.join(bad[names[rank]])}", flush=True)
    if bad:
        sys.exit(BAD_NODES)


class Meeting:
    """The nodes tell the first one what they are; it judges, and all hear the verdict."""

    def __init__(
        self, config: PreflightConfig, names: list[str], rank: int, measurer: NodeMeasurer
    ) -> None:
        self._config, self._names, self._rank = config, names, rank
        self._measurer = measurer
        limit_s = config.meeting_s + (0 if rank == 0 else _OPENED_S)
        self._store = open_store(limit_s, as_host=rank == 0)

    def hold(self) -> tuple[Faults, dict[str, Any]]:
        """What is wrong by node, and what was seen (on the first node alone)."""
        config, names = self._config, self._names
        facts = facts_of_node(config)
        told = self._gather("facts", facts, config.meeting_s)
        bad = self._decide("facts", told, lambda: judge_facts(told, config.address))
        report = {"facts": told}
        if not bad:
            gpus = facts["gpus"]
            measures = self._measurer.measure(
                self._rank,
                len(names),
                config.processes or len(gpus) or 1,
                on_gpu=bool(gpus),
                limit_s=config.exchange_s,
            )
            measured = self._gather("measures", measures, config.exchange_s)
            bad = self._decide("measures", measured, lambda: judge_measures(measured, config))
            report["measures"] = measured
        self._part()
        return bad, report

    def _gather(self, topic: str, own: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """What each node says, for the first one; None for those who did not in time."""
        self._store.set(f"{topic}/{self._rank}", json.dumps(own))
        told: dict[str, Any] = {self._names[self._rank]: own}
        if self._rank != 0:
            return told
        deadline = time.monotonic() + limit_s
        waiting = dict(enumerate(self._names))
        told = {}
        while waiting and time.monotonic() < deadline:
            for index, name in list(waiting.items()):
                if self._store.check([f"{topic}/{index}"]):
                    told[name] = json.loads(self._store.get(f"{topic}/{index}"))
                    del waiting[index]
            time.sleep(0.05)
        return {name: told.get(name) for name in self._names}

    def _decide(self, topic: str, told: Mapping[str, Any], judge: Any) -> Faults:
        if self._rank == 0:
            bad: Faults = judge()
            self._store.set(f"verdict/{topic}", json.dumps(bad))
            return bad
        limit_s = self._config.meeting_s + 2 * self._config.exchange_s
        deadline = time.monotonic() + limit_s
        while not self._store.check([f"verdict/{topic}"]):
            if time.monotonic() > deadline:
                raise ValueError(f"no verdict of {self._names[0]} on {topic} in {limit_s:.0f} s")
            time.sleep(0.05)
        return json.loads(self._store.get(f"verdict/{topic}"))

    def _part(self) -> None:
        """The first node keeps the store until the others have read it."""
        self._store.add("parted", 1)
        deadline = time.monotonic() + 5
        while self._rank == 0 and time.monotonic() < deadline:
            if self._store.add("parted", 0) >= len(self._names):
                return
            time.sleep(0.05)


def describe(names: list[str], bad: Faults, report: dict[str, Any]) -> list[str]:
    """The lines for a person."""
    lines = []
    for node, said in report["facts"].items():
        if said is not None:
            kinds = [gpu["name"] for gpu in said["gpus"]]
            gpus = f"{len(kinds)} x {kinds[0]}" if kinds else "no GPU: its checks are left out"
            lines.append(f"{node} ({said['host']}): {gpus}, writes {said['write_mb_per_s']} MB/s")
    measures = report.get("measures", {})
    for node, one in measures.items():
        if one is not None and one.get("on_gpu"):
            rates = ", ".join(f"{rate:.0f}" for rate in one["tflops"])
            lines.append(f"{node}: {rates} TFLOP/s; all-reduce inside {_rate(one['node'])} GB/s")
    first = measures.get(names[0])
    if first is not None and not first["failure"]:
        lines.append(
            f"over all: all-reduce {_rate(first['all_reduce'])} GB/s, "
            f"all-to-all {_rate(first['all_to_all'])} GB/s"
        )
    lines += [f"{node} is bad: {'; '.join(faults)}" for node, faults in bad.items()]
    verdict = f"{len(bad)} of {len(names)} node(s) are bad" if bad else f"{len(names)} good node(s)"
    return [*lines, f"preflight: {verdict}, {report['seconds']:.1f} s"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _write(config: PreflightConfig, bad: Faults, report: dict[str, Any]) -> None:
    if config.output is None:
        return
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preflight.json").write_text(json.dumps(report, indent=1))
    (folder / "bad_nodes").write_text("".join(f"{node}\n" for node in bad))


def main() -> None:
    """Entry point."""
    run_hydra(preflight, "preflight", PreflightConfig)


if __name__ == "__main__":
    main()
