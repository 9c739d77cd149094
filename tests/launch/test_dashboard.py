"""The workspace as code: what wandb would be sent, and what happens without wandb."""

from pathlib import Path

import pytest

from fulmen.launch import dashboard
from fulmen.launch.dashboard import SECTIONS, DashboardConfig, build_workspace, to_json
from fulmen.trainer.charts import ALL_GROUPS, GROUPS, chart_name

GOLDEN = Path(__file__).parent / "golden" / "dashboard.json"
"""Made by `python launch/dashboard.py output=tests/launch/golden/dashboard.json`; read its diff."""


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_workspace_is_the_golden_one_and_loads_again() -> None:
    text = to_json(build_workspace(DashboardConfig()))
    assert text == GOLDEN.read_text()

    from wandb_workspaces.workspaces import Workspace, internal

    back = Workspace._from_model(internal.View.model_validate_json(text))
    assert [section.name for section in back.sections] == list(SECTIONS)
    assert back.settings.x_axis == "tokens"
    titles = [chart.title for chart in SECTIONS["Loss"]]
    assert [panel.title for panel in back.sections[0].panels] == titles


@pytest.mark.fast
def test_each_metric_with_a_group_is_shown() -> None:
    charts = [chart for section in SECTIONS.values() for chart in section]
    shown = {key for chart in charts for key in chart.keys} | {"expert_load"}
    assert set(GROUPS) <= shown
    groups = {chart_name(key).split("/")[0] for key in shown}
    groups |= {chart.names.lstrip("^").split("/")[0] for chart in charts if chart.names}
    assert groups == set(ALL_GROUPS)


class Saved:
    url = "https://wandb.ai/team/fulmen?nw=abc"


@pytest.mark.fast
def test_it_is_saved_with_a_login_and_written_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(_: DashboardConfig) -> object:
        return object()

    def unreachable(*_: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(dashboard, "build_workspace", build)
    monkeypatch.setattr(dashboard, "to_json", lambda _: "{}\n")
    output = tmp_path / "new" / "dashboard.json"

    def run(entity: str | None, *, login: bool) -> str:
        monkeypatch.setattr(dashboard, "has_login", lambda: login)
        output.unlink(missing_ok=True)
        dashboard.dashboard(DashboardConfig(entity=entity, output=str(output)))
        return capsys.readouterr().out

    monkeypatch.setattr(dashboard, "save", lambda *_: Saved.url)
    assert run("team", login=True) == f"saved: {Saved.url}\n"
    assert not output.exists()
    assert "entity=TEAM" in run(None, login=True)
    assert output.read_text() == "{}\n"
    assert "wandb login" in run("team", login=False)
    monkeypatch.setattr(dashboard, "save", unreachable)
    assert "did not take it: ConnectionError: no route" in run("team", login=True)
    assert output.exists()
    with pytest.raises(ValueError, match="entity=TEAM"):
        dashboard.dashboard(DashboardConfig(url=Saved.url))
