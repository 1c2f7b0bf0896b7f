"""Fused kernels and resident weights against the plain path, on a GPU in bfloat16. Skips itself without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launch.inputs.families import FAMILIES
from launch.recipe.loading import recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import recipe_values
from tests.helpers.tiny_families import write_tiny
from trainer.data.encoder import Encoder
from trainer.data.packing import pack
from trainer.data.splits import open_split
from trainer.model import base
from trainer.model.base import RECIPE_DTYPES, compute_in, load_base, prepare_training
from trainer.model.dropout import DRAWS, channel_words, keep_mask
from trainer.model.lora import add_lora, trainable_parameters
from trainer.model.lora_kernels import Adapter, adapter_gradients, add_back, add_up, project
from trainer.prepare import prepare
from trainer.pretrained import load_processor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BFLOAT16 = RECIPE_DTYPES["bfloat16"]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def recipe(request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    values = recipe_values(world)
    base_folder = tmp_path_factory.mktemp("bases") / request.param
    values["model"]["name_or_path"] = str(write_tiny(request.param, base_folder))
    values["model"]["dtype"] = "bfloat16"
    values["quantization"] = {"load_in_4bit": True}
    values["lora"] = {"lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return recipe_from_dict(values)


@pytest.fixture(scope="module", params=["sequence", "answer"])
def inputs(request: pytest.FixtureRequest, recipe: Recipe) -> dict[str, Any]:
    """A packed micro-batch of step 3 on the GPU; with the loss on the answer its samples share a prefix."""
    prepare(recipe, quiet=True)
    processor = load_processor(recipe)
    encoder = Encoder(processor, recipe.data.system_message, request.param)
    prefix = len(encoder.shared_prefix)
    assert (prefix > 0) == (request.param == "answer")
    rows = open_split(recipe, "train")
    packed = pack(
        [encoder(rows[number]) for number in range(6)],
        sample_ids=range(6),
        step=3,
        masked=False,
        image_token_id=processor.image_token_id,
        merge=2,
        prefixes=[prefix] * 6,
    )
    return {key: v.cuda() if isinstance(v, torch.Tensor) else v for key, v in packed.items()}


def _run(recipe: Recipe, inputs: dict[str, Any], **settings: Any) -> tuple[float, torch.Tensor, str]:
    """Loss and all adapter gradients, one after another, of a model with random adapters."""
    model = add_lora(load_base(recipe, torch.device("cuda", 0)), recipe).train()
    draw = torch.Generator("cuda").manual_seed(1)
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data.normal_(0, 0.02, generator=draw)
    way = prepare_training(model, recipe, compute_dtype=BFLOAT16, **settings)
    compute_in(model, BFLOAT16)
    given = dict(inputs)
    labels = given.pop("shift_labels")[0]
    loss = torch.nn.functional.cross_entropy(model(**given).logits[0].float(), labels)
    loss.backward()
    gradients = []
    for parameter in parameters.values():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        gradients.append(parameter.grad.flatten())
    return loss.item(), torch.cat(gradients), way


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resident_weights": True},
        {"recompute_every": 1},
        {"resident_weights": True, "recompute_every": 2},
    ],
)
def test_fused_kernels_give_the_losses_and_gradients_of_plain_ones(
    recipe: Recipe, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    loss, gradients, way = _run(recipe, inputs, **settings)
    assert "fused" in way
    monkeypatch.setattr(base, "_no_kernels", lambda *_: "asked for")
    plain_loss, plain_gradients, way = _run(recipe, inputs)
    assert "plain" in way
    assert loss == pytest.approx(plain_loss, rel=2e-3)
    apart = (gradients - plain_gradients).norm() / plain_gradients.norm()
    assert apart < 3e-2


def test_recomputed_layers_keep_nothing_but_their_input(recipe: Recipe, inputs: dict[str, Any]) -> None:
    kept = {}
    for every in (0, 1):
        model = add_lora(load_base(recipe, torch.device("cuda", 0)), recipe).train()
        prepare_training(model, recipe, compute_dtype=BFLOAT16, recompute_every=every)
        compute_in(model, BFLOAT16)
        given = {key: value for key, value in inputs.items() if key != "shift_labels"}
        before = torch.cuda.memory_allocated()
        output = model(**given).logits
        kept[every] = torch.cuda.memory_allocated() - before
        del output
    assert kept[1] < kept[0]


def test_a_step_reads_nothing_back_from_the_device(recipe: Recipe, inputs: dict[str, Any]) -> None:
    model = add_lora(load_base(recipe, torch.device("cuda", 0)), recipe).train()
    prepare_training(model, recipe, compute_dtype=BFLOAT16, resident_weights=True)
    compute_in(model, BFLOAT16)
    given = {key: value for key, value in inputs.items() if key != "shift_labels"}
    model(**given).logits.sum().backward()  # constants travel to the device once, kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**given).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rank", [8, 64, 128])
def test_the_tiles_of_loras_kernels_fit_every_rank_and_give_the_plain_products(rank: int) -> None:
    tokens, channels, dropped = 1000, 3584, 6000
    draw = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=dtype, device="cuda")

    x, of_x, output = (random(tokens, channels) for _ in range(3))
    words, scale = channel_words(channels // 2, x.device), DRAWS / (DRAWS - dropped)
    keys = torch.randint(
        -(2**31), 2**31 - 1, (2, tokens, 2), generator=draw, dtype=torch.int32, device="cuda"
    )
    downs = [random(rank, channels, dtype=torch.float32) / 60 for _ in range(2)]
    adapters = [Adapter(down, own, words, dropped, scale, 2.0) for down, own in zip(downs, keys, strict=True)]
    inners = [random(tokens, rank) for _ in range(2)]
    kept = [keep_mask(own, channels, dropped) * scale * 2 for own in keys]
    rounded = [down.to(BFLOAT16).float() for down in downs]
    pairs = []
    for number, (projected, of_down) in enumerate(
        zip(project(x, adapters), adapter_gradients(x, inners, adapters), strict=True)
    ):
        pairs.append((projected, (x * kept[number]) @ rounded[number].t()))
        pairs.append((of_down, inners[number].t().float() @ (x * kept[number])))
    back = sum(kept[place] * (inners[place].float() @ rounded[place]) for place in range(2))
    expected = of_x + back, output + inners[0].float() @ rounded[0]
    add_back(of_x, inners, adapters)
    add_up(output, inners[0], downs[0].t().contiguous())
    for found, plain in (*pairs, *zip((of_x, output), expected, strict=True)):
        assert (found - plain).norm() < 5e-3 * plain.norm()
