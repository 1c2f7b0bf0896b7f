"""Rows filled up to the sizes of CUDA graphs compute what they did; graphs are in tests/gpu/test_layer_graphs.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from launch.recipe.loading import recipe_from_dict
from tests.conftest import recipe_values
from tests.helpers.adapters import random_adapter
from trainer.data.encoder import Encoder
from trainer.data.packing import pack
from trainer.data.splits import open_split
from trainer.model.attention import Segments
from trainer.model.base import prepare_training, trainable_parameters
from trainer.model.filled_rows import Bucket, Row, bucket_of
from trainer.model.layer_graphs import LayerGraphs, _Graph
from trainer.prepare import prepare
from trainer.pretrained import load_processor


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ((800, 700, 900, 850), Bucket(3328, 8, 2048)),
        ((3328,), Bucket(3328, 8, 4096)),
        ((1000,) * 4 + (96,), Bucket(4096, 8, 2048)),
        ((1000,) * 4 + (97,), Bucket(4352, 8, 2048)),
        ((100,) * 8, Bucket(896, 16, 2048)),  # with the segment that fills up there are nine
    ],
)
def test_a_row_is_filled_up_to_whole_tiles_of_tokens_and_a_power_of_two_of_segments(
    lengths: tuple[int, ...], bucket: Bucket
) -> None:
    assert bucket_of(lengths) == bucket


def test_a_row_is_filled_up_by_a_segment_of_its_own_and_empty_ones() -> None:
    bucket = bucket_of((3, 4))
    row = Row(
        torch.ones(1, 7, 16),
        torch.ones(1, 7, 8),
        torch.ones(1, 7, 8),
        Segments(torch.tensor([0, 3, 7], dtype=torch.int32), (3, 4)),
        torch.ones(5, 7, 2, dtype=torch.int32),
    ).filled_up(bucket)
    assert row.segments.cu_seqlens.tolist() == [0, 3, 7] + [128] * 6
    assert row.segments.cu_seqlens.dtype == torch.int32
    assert row.segments.lengths == (3, 4, 121, 0, 0, 0, 0, 0)
    assert row.hidden.shape == (1, 128, 16)
    assert row.hidden.sum() == 7 * 16
    assert row.cos.shape == (1, 128, 8)
    assert row.dropout_keys is not None
    assert row.dropout_keys.shape == (5, 128, 2)
    assert row.dropout_keys[:, 7:].eq(0).all()


def bucket_of_filled(row: Row) -> Bucket:
    """Of a row that is filled up."""
    return Bucket(row.hidden.shape[1], len(row.segments.lengths), 2048)


class OnCpu:
    """In the place of a CUDA graph: computes when it is replayed."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


def replayed_on_a_cpu(graphs: LayerGraphs, like: Row) -> _Graph:
    """What `LayerGraphs._captured` makes, without a GPU."""
    row = Row(
        *(torch.zeros_like(each) for each in (like.hidden, like.cos, like.sin)),
        Segments(like.segments.cu_seqlens.clone(), like.segments.lengths),
        None if like.dropout_keys is None else torch.zeros_like(like.dropout_keys),
    )
    output, of_output = torch.zeros_like(row.hidden), torch.zeros_like(row.hidden)
    gradients = torch.zeros(sum(each.numel() for each in graphs._parameters))
    passed: list[Any] = []

    def forward() -> None:
        with torch.enable_grad(), graphs._stand_ins() as stand_ins:
            passed[:] = graphs._compute(row), stand_ins
        output.copy_(passed[0].detach())

    def backward() -> None:
        each = torch.autograd.grad(passed[0], passed[1], of_output)
        torch.cat([gradient.reshape(-1) for gradient in each], out=gradients)

    return _Graph(OnCpu(forward), OnCpu(backward), row, output, of_output, gradients)  # type: ignore[arg-type]


def test_filled_up_rows_and_replays_of_them_change_no_loss_and_no_gradient(world: Path) -> None:
    values = recipe_values(world)
    values["lora"] = {"lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    recipe = recipe_from_dict(values)
    prepare(recipe, quiet=True)
    rows, processor = open_split(recipe, "train"), load_processor(recipe)
    model: Any = random_adapter(recipe).train()
    prepare_training(model, recipe)
    weights = trainable_parameters(model)

    def passes(loss: Literal["answer", "sequence"]) -> tuple[list[float], torch.Tensor]:
        encoder = Encoder(processor, recipe.data.system_message, loss)
        for weight in weights.values():
            weight.grad = None
        losses = []
        for samples in ((0, 1, 2, 3), (4, 5)):
            inputs = pack(
                [encoder(rows[sample]) for sample in samples],
                sample_ids=samples,
                step=5,
                masked=False,
                image_token_id=processor.image_token_id,
                merge=2,
            )
            loss_of_batch = -model(**inputs).log_probs.sum()
            loss_of_batch.backward()
            losses.append(loss_of_batch.item())
        return losses, torch.cat([weight.grad.flatten() for weight in weights.values()])  # type: ignore[union-attr]

    plain = {loss: passes(loss) for loss in ("answer", "sequence")}
    graphs = LayerGraphs(list(model.get_base_model().model.language_model.layers), 8192)
    computed: list[Row] = []
    compute = graphs._compute
    graphs._compute = lambda row: (computed.append(row), compute(row))[1]  # type: ignore[method-assign,func-returns-value]
    for loss, (losses, gradients) in plain.items():
        filled_losses, filled = passes(loss)
        assert graphs._taken
        assert filled_losses == pytest.approx(losses, rel=1e-6)
        assert (filled - gradients).abs().max() <= 1e-5 * max(1.0, float(gradients.abs().max()))
    graphs._compute = compute  # type: ignore[method-assign]
    for row in computed[:2]:
        graphs._graphs[bucket_of_filled(row)] = replayed_on_a_cpu(graphs, row)
    graphs._addresses = graphs._present_addresses()
    losses, gradients = passes("sequence")
    assert graphs.replays == 2
    assert losses == pytest.approx(plain["sequence"][0], rel=1e-6)
    apart = (gradients - plain["sequence"][1]).abs().max()
    assert apart <= 1e-5 * max(1.0, float(gradients.abs().max()))
    graphs.given_up = True
    assert passes("answer")[0] == plain["answer"][0]
    assert not graphs._taken
