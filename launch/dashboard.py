"""A wandb workspace for runs of fulmen: `python launch/dashboard.py entity=TEAM [key=value ...]`.

With a login the workspace is saved to wandb and its address printed; without one it is written as
JSON. Needs the package wandb-workspaces.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.launch.hydra_main import run_hydra
from fulmen.trainer.charts import chart_name

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

INSTALL = "pip install 'wandb-workspaces==0.4.13'"
"""What is behind `_to_model` is private to the package: hence one version."""


@dataclass
class DashboardConfig:
    """Where the workspace goes."""

    entity: str | None = None
    """User or team on wandb; null = write JSON alone."""
    project: str = "fulmen"
    """Project of the runs, their log.wandb_project."""
    name: str = "fulmen"
    """Of the workspace, as wandb shows it."""
    url: str | None = None
    """Of a workspace to replace; null = make a new one."""
    output: str = "dashboard.json"
    """The file that is written where there is no login, or no entity."""


@dataclass(frozen=True)
class Chart:
    """Lines over tokens: rows' keys, or a regular expression of charts' names."""

    title: str
    keys: tuple[str, ...] = ()
    names: str = ""
    log_y: bool = False


SECTIONS: dict[str, list[Chart]] = {
    "Loss": [
        Chart("Training loss", ("loss",)),
        Chart("Training loss by source", names="^loss/.*"),
        Chart("Held-out loss by source", names="eval/loss/.*"),
        Chart("Gradient norm", ("grad_norm",), log_y=True),
        Chart("Gradient norm by part of the model", names="grad_norm/.*", log_y=True),
        Chart("Learning rate", ("lr",)),
        Chart("Tokens of a row", ("seq_len",)),
    ],
    "Speed": [
        Chart("Model FLOPs utilisation", ("mfu", "mfu_palm")),
        Chart("Tokens/s, all devices", ("tokens_per_s",)),
        Chart("TFLOP/s of a device", ("tflops_per_device",)),
        Chart("FLOP of a token", ("flops_per_token",)),
        Chart("Seconds of a step", ("step_time_s",)),
        Chart("Seconds of waiting for data", ("data_wait_s",)),
        Chart("Seconds that a checkpoint held up", ("checkpoint_stall_s",)),
        Chart("Peak memory of rank 0, GiB", ("memory_gib",)),
    ],
    "Experts": [
        Chart("Dropped assignments", ("drop_rate",)),
        Chart("Busiest expert over the mean", ("expert_imbalance",)),
        Chart("Balance loss", ("aux_loss",)),
    ],
    "Health": [
        Chart("Skipped step (1)", ("skipped",)),
        Chart("Times that the run went back", ("rewinds",)),
    ],
    "Long texts and reading": [
        Chart("Needle in a haystack by length", names="eval/niah/.*"),
        Chart(
            "Other tasks by length",
            names="eval/(multi_key|many_keys|multi_value|tracking|passage|common_words)/.*",
        ),
        Chart("Reading of images", names="eval/reading/.*"),
    ],
    "Preference": [
        Chart("Reward margin", ("reward_margin",)),
        Chart("Pairs with the right order", ("reward_accuracy",)),
        Chart("Log-ratios", ("chosen_log_ratio", "rejected_log_ratio")),
        Chart("Pairs of a step", ("num_pairs",)),
        Chart(
            "Held-out pairs",
            names="eval/(dpo_loss|reward_margin|reward_accuracy|chosen_log_ratio"
            "|rejected_log_ratio)/.*",
        ),
    ],
    "Pretraining of a tower": [
        Chart("Losses", ("caption_loss", "contrastive_loss")),
        Chart("Pairs told apart in a step", ("contrastive_accuracy",)),
        Chart("Temperature", ("temperature",)),
        Chart("Held-out losses", names="eval/(caption|contrastive)_loss/.*"),
        Chart("Held-out accuracy", names="eval/(contrastive_accuracy|zero_shot)/.*"),
    ],
    "Data": [Chart("Tokens by source and length", names="tokens/.*")],
}
"""Charts by the section that they are in."""
HEAT_MAP = ("Experts", "Load of each expert (across) in each layer (down)")
"""Section and title."""


def build_workspace(config: DashboardConfig) -> "Workspace":
    """The workspace, not yet saved; `ValueError` where the package is missing."""
    try:
        from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser
        from wandb_workspaces.workspaces import Section, Workspace, WorkspaceSettings
    except ImportError as error:
        raise ValueError(f"wandb-workspaces cannot be imported ({error}): {INSTALL}") from None

    sections = []
    for number, (title, charts) in enumerate(SECTIONS.items()):
        panels: list[Any] = [
            LinePlot(
                title=chart.title,
                x="tokens",
                y=[chart_name(key) for key in chart.keys],
                metric_regex=chart.names or None,
                log_y=chart.log_y or None,
            )
            for chart in charts
        ]
        if title == HEAT_MAP[0]:
            panels.append(MediaBrowser(title=HEAT_MAP[1], media_keys=[chart_name("expert_load")]))
        for place, panel in enumerate(panels):
            panel._id = f"fulmen-{number}-{place}"  # else a random one
        sections.append(Section(name=title, panels=panels, is_open=number < 3))
    return Workspace(
        entity=config.entity or "",
        project=config.project,
        name=config.name,
        sections=sections,
        settings=WorkspaceSettings(x_axis="tokens"),
    )


def to_json(workspace: "Workspace") -> str:
    """What wandb would be sent, as indented JSON; the same in each call."""
    return workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1) + "\n"


def has_login() -> bool:
    """Whether wandb may be asked: it has a key, and was not told to stay offline."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    return wandb.Settings().api_key is not None or bool(wandb.login(prompt=False))


def save(workspace: "Workspace", url: str | None) -> str:
    """Save to wandb, in place of the workspace at `url` if one is given; returns the address."""
    from wandb_workspaces.workspaces import Workspace

    if url is not None:
        old = Workspace.from_url(url)
        old.name, old.sections = workspace.name, workspace.sections
        old.settings = workspace.settings
        workspace = old
    return str(workspace.save().url)


def dashboard(config: DashboardConfig) -> None:
    """Save the workspace to wandb, or write it."""
    if config.url is not None and config.entity is None:
        raise ValueError("url: give the entity that it belongs to as well, entity=TEAM")
    workspace = build_workspace(config)
    fault = "give entity=TEAM to save it to wandb"
    if config.entity is not None:
        try:
            if has_login():
                print(f"saved: {save(workspace, config.url)}")
                return
            fault = "to save it to wandb, log in (`wandb login` or WANDB_API_KEY)"
        except Exception as error:  # whatever wandb and the network raise
            fault = f"wandb did not take it: {type(error).__name__}: {error}"
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(to_json(workspace))
    print(f"written: {output}; {fault}")


def main() -> None:
    """Entry point."""
    run_hydra(dashboard, "dashboard", DashboardConfig)


if __name__ == "__main__":
    main()
