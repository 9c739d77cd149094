"""Zero-shot classification: an image is of the class whose name's embedding is nearest.

A labelled folder is a prepared one, `resolution=fixed`, whose captions are the names of the
classes. Its classes are those that occur. Each name is put into every template, and the embedding
of a class is the mean of those of its texts, scaled to length 1 again, as for CLIP.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from fulmen.data.micro_batches import check_vision
from fulmen.data.shards import PreparedSplit
from fulmen.data.tokenise import load_tokenizer, tokenizer_path
from fulmen.models.coca import Captions, CoCa
from fulmen.parallel.config import ParallelConfig
from fulmen.parallel.mesh import Mesh
from fulmen.trainer.caption_inputs import caption_inputs, check_captions, move_captions, pad_rows
from fulmen.trainer.config import RunConfig, ZeroShotConfig, to_dataclass
from fulmen.trainer.evaluate import held_out_batches
from fulmen.trainer.load import load_captioner
from fulmen.trainer.run_config import load_run_config
from fulmen.trainer.run_log import log

TEXTS_AT_ONCE = 256


def classify_by_checkpoint(
    checkpoint: Path,
    folders: Mapping[str, ZeroShotConfig] | None,
    *,
    dtype: torch.dtype,
    mesh: Mesh,
) -> dict[str, float]:
    """Accuracy on each folder, or on those of the run that wrote the checkpoint; all ranks call it.

    `ValueError` for a checkpoint of another model, or if there are no folders.
    """
    tree = OmegaConf.merge(OmegaConf.structured(RunConfig), load_run_config(checkpoint))
    config = to_dataclass(tree, RunConfig)
    folders = config.evaluation.zero_shot if folders is None else folders
    if not folders:
        raise ValueError(f"{checkpoint} names no labelled folders: give path=FOLDER")
    model = load_captioner(checkpoint, dtype=dtype, mesh=mesh, parallel=ParallelConfig())
    opened = {name: ZeroShot(name, one, config, mesh) for name, one in folders.items()}
    return {name: one.accuracy(model) for name, one in opened.items()}


class ZeroShot:
    """One labelled folder, whose split `valid` is classified."""

    def __init__(self, name: str, settings: ZeroShotConfig, config: RunConfig, mesh: Mesh) -> None:
        """ValueError, naming the key, for a folder or templates that cannot be used."""
        key = f"evaluation.zero_shot.{name}"
        if not settings.templates or any("{}" not in one for one in settings.templates):
            raise ValueError(f"{key}.templates={settings.templates}: give texts with {{}} in them")
        vision = config.model.vision
        assert vision is not None
        self._config, self._mesh = config, mesh
        try:
            self._split = PreparedSplit(
                settings.path,
                "valid",
                name=name,
                vocab_size=config.model.vocab_size,
                part=mesh.dp_rank,
                num_parts=mesh.dp,
            )
            check_captions(self._split, config.model)
            check_vision([self._split], vision.tiling, vision.image_token_id)
        except ValueError as error:
            raise ValueError(str(error).replace(f"data.sources.{name}", key)) from None
        self._patches = vision.tiling.patches_per_tile
        tokenizer = load_tokenizer(str(tokenizer_path(settings.path)))
        named = sorted({self._name(n) for n in range(self._split.num_documents)})
        self._classes = {tokens: number for number, tokens in enumerate(named)}
        self._texts = [
            [
                [vision.image_token_id]
                + tokenizer.encode(template.replace("{}", word), add_special_tokens=False).ids
                for template in settings.templates
            ]
            for word in (tokenizer.decode(list(tokens)) for tokens in named)
        ]
        if len(named) < 2:
            raise ValueError(f"{key}: {settings.path} has captions of one kind: no classes")
        if mesh.rank == 0:
            log.info(
                "zero-shot %s: %d images of %d classes, by chance %.1f %%",
                name,
                self._split.num_documents,
                len(named),
                100 / len(named),
            )

    @torch.no_grad()
    def accuracy(self, model: CoCa) -> float:
        """Share of images that are given their class; all ranks call it."""
        classes = self._embed_classes(model)
        sums = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)  # right, all
        for batch in held_out_batches(
            self._split,
            self._mesh,
            self._config,
            max_tokens=self._split.num_tokens,
            doing="zero-shot classification",
        ):
            pixels, captions = caption_inputs(batch, self._config.model, self._mesh.device)
            found = (model(pixels) @ classes.T).argmax(1)
            if captions.count == 0:
                continue
            own = [
                self._classes[tuple(ids[1:length])]
                for ids, length in zip(
                    captions.input_ids.tolist(), captions.lengths.tolist(), strict=True
                )
            ]
            sums[0] += (found == torch.tensor(own, device=found.device)).sum()
            sums[1] += len(own)
        dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    def _name(self, number: int) -> tuple[int, ...]:
        """The tokens of a document's caption without its end."""
        return tuple(self._split.document(number)[self._patches : -1].tolist())

    def _embed_classes(self, model: CoCa) -> Tensor:
        """`[classes, embedding_size]` of unit length."""
        assert self._config.model.coca is not None
        most = self._config.model.coca.max_text_tokens
        texts = [torch.tensor(ids[:most]) for texts in self._texts for ids in texts]
        parts = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            rows = texts[first : first + TEXTS_AT_ONCE]
            lengths = torch.tensor([len(row) for row in rows])
            captions = move_captions(Captions(pad_rows(rows, 0), lengths), self._mesh.device)
            parts.append(model(None, captions))
        found = torch.cat(parts).unflatten(0, (len(self._texts), -1))
        return F.normalize(found.mean(1), dim=-1)
