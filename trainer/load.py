"""A checkpoint's model, to be read with: on one device, or spread over the ranks of a mesh."""

from pathlib import Path

import torch

from fulmen.models.coca import CoCa
from fulmen.models.config import MoEConfig
from fulmen.models.text import TextModel
from fulmen.models.vl import build_language_model
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import Mesh
from fulmen.parallel.plan import parallelize
from fulmen.trainer.checkpoint import Checkpointer
from fulmen.trainer.manifest import CheckpointError
from fulmen.trainer.weights import CheckpointWeights, load_model_config


def load_model(checkpoint: Path, *, dtype: torch.dtype, device: torch.device) -> TextModel:
    """The model of a checkpoint folder, on one device; routing is dropless, as in inference."""
    config = load_model_config(checkpoint)
    with torch.device("meta"):
        model = build_language_model(config, MoEConfig())
    weights = CheckpointWeights(checkpoint)
    # One tensor at a time, so that host memory holds no second copy of the model. Routers stay in
    # fp32, as in training: rounded weights would send some tokens to other experts.
    state = {
        name: weights.read(name, dtype=torch.float32 if ".gate." in name else dtype).to(device)
        for name, _ in model.named_parameters()
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def load_spread_model(
    checkpoint: Path, *, dtype: torch.dtype, mesh: Mesh, parallel: ParallelConfig
) -> TextModel:
    """The same, spread as in training; all ranks call it."""
    with torch.device("meta"):
        model = build_language_model(load_model_config(checkpoint), MoEConfig())
    _spread(model, checkpoint, dtype=dtype, mesh=mesh, parallel=parallel)
    return model.eval()


def load_captioner(
    checkpoint: Path, *, dtype: torch.dtype, mesh: Mesh, parallel: ParallelConfig
) -> CoCa:
    """A tower with its captioner, spread; all ranks call it. `ValueError` for another model."""
    config = load_model_config(checkpoint)
    if config.coca is None:
        raise ValueError(f"{checkpoint} is no tower with a captioner (model.coca): it has no texts")
    with torch.device("meta"):
        model = CoCa(config)
    _spread(model, checkpoint, dtype=dtype, mesh=mesh, parallel=parallel)
    return model.eval()


def _spread(
    model: TextModel | CoCa,
    checkpoint: Path,
    *,
    dtype: torch.dtype,
    mesh: Mesh,
    parallel: ParallelConfig,
) -> None:
    engine = parallelize(
        model,
        mesh,
        parallel,
        dtype=dtype,
        activation_checkpointing="none",
        compile_blocks=False,
        seed=0,
    )
    tensors = {f"model.{name}": value.detach() for name, value in engine.parameters.items()}
    checkpointer = Checkpointer(checkpoint.parent, keep=1)
    try:
        fault = checkpointer.find_fault(checkpoint)
        if fault is not None:
            raise CheckpointError(fault)
        checkpointer.load(checkpoint, tensors)
    finally:
        checkpointer.close()
