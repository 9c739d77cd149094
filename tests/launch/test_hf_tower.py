"""Export of a tower after its own pretraining, as transformers' CLIPVisionModel."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.captioned import tiny_coca

from fulmen.launch.export_hf import ExportConfig, export
from fulmen.models.coca import CoCa
from fulmen.models.init import init_model
from fulmen.trainer.load import load_model
from fulmen.trainer.weights import Piece, save_weights

pytestmark = pytest.mark.fast


def test_transformers_reads_the_tower(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = tiny_coca()
    model = CoCa(config)
    init_model(model, config, 0)
    pieces = [
        Piece(name, tuple(p.shape), (0, p.shape[0]), lambda p=p: p.detach())
        for name, p in model.named_parameters()
    ]
    run = {"model": asdict(config), "data": {"seq_len": 64}}
    save_weights(tmp_path / "checkpoint", pieces, run)
    options = {"checkpoint": str(tmp_path / "checkpoint"), "output": str(tmp_path / "hf")}
    export(ExportConfig(**options, dtype="float32"), Console(quiet=True))
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["architectures"] == ["CLIPVisionModel"]
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()
    theirs = transformers.CLIPVisionModel.from_pretrained(tmp_path / "hf").eval()
    pixels = torch.randn(2, 3, 28, 28)
    wanted = model.vision_tower(pixels)
    got = theirs(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

    with pytest.raises(ValueError, match=r"learns from captions .*no language model"):
        load_model(tmp_path / "checkpoint", dtype=torch.float32, device=torch.device("cpu"))
