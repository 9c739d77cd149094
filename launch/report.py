"""A page of a run, `report.py 'runs=[A]'`, or of several: `report.py 'runs=[A,B]' output=FILE`."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from fulmen.launch.fit_scaling import find_runs
from fulmen.launch.hydra_main import run_hydra


@dataclass
class ReportConfig:
    """Of which runs, and where to."""

    runs: list[str] = MISSING
    """Runs' folders, or patterns of them (`runs/scaling/*`); they may still be going on."""
    output: str | None = None
    """The page; null = report.html in the folder of the one run."""


def report(config: ReportConfig) -> None:
    """Write one page and print its path."""
    from fulmen.trainer.compare import write_comparison
    from fulmen.trainer.report import write_report

    runs = find_runs(config.runs)
    output = None if config.output is None else Path(config.output)
    if len(runs) == 1:
        print(write_report(runs[0], output))
    elif output is None:
        raise ValueError(f"output: say where the page of {len(runs)} runs goes, output=FILE.html")
    else:
        print(write_comparison(runs, output))


def main() -> None:
    """Entry point."""
    run_hydra(report, "report", ReportConfig)


if __name__ == "__main__":
    main()
