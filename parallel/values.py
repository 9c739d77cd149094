"""Initial values of a sharded model."""

from fulmen.models.config import ModelConfig
from fulmen.models.init import init_rows
from fulmen.parallel.zero import ZeroEngine, local_rows


def give_values(engine: ZeroEngine, config: ModelConfig, seed: int) -> None:
    """Allocate each rank's part of a model with its initial values; call after the last `shard`."""
    engine.materialize()
    for name, parameter in engine.parameters.items():
        for rows, first_row, first_column in local_rows(parameter):
            init_rows(
                rows,
                name,
                parameter.shape,
                config=config,
                seed=seed,
                first_row=first_row,
                first_column=first_column,
            )
