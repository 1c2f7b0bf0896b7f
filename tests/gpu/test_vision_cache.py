"""Kept vision features on a GPU: copied beside the training's stream, and the same losses. Skips itself without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.distributed.recorded import apart, write_recipe
from trainer import train
from trainer.prepare import main as prepare
from trainer.vision_cache.file import Features, Kind
from trainer.vision_cache.store import image_name, open_cache
from trainer.vision_cache.writer import FeatureWriter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where features are kept."""
    monkeypatch.setenv("SAMESTEP_VISION_CACHE", str(tmp_path / "features"))
    return tmp_path / "features"


def test_features_leave_the_gpu_without_a_wait_and_unharmed() -> None:
    """Behind work that is still queued; the memory of what is kept is asked for again at once."""
    cache = open_cache("disk", Kind(b"k" * 16, torch.bfloat16, 3584, 2), {})
    writer = FeatureWriter(cache, pytest.fail)
    expected: dict[str, Features] = {}
    busy = torch.randn(4096, 4096, device="cuda")
    for number in range(3):
        values = torch.randn(688, 3584).to(torch.bfloat16)
        image = image_name(bytes([number]))
        expected[image] = Features(values, (1, 32, 86))
        on_gpu = values.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                busy = busy @ busy
                busy = busy / busy.norm()
            features = on_gpu * 1.0
            writer.keep([image], [(1, 32, 86)], features)
            shape = features.shape
            del features
            torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    writer.close()
    assert (writer.kept, writer.dropped) == (3, 0)
    for image, features in expected.items():
        found = cache.read(image)
        assert found is not None
        assert torch.equal(found.values, features.values)


def test_a_4_bit_run_in_bfloat16_has_its_losses_with_kept_features(
    world: Path, place: Path, tmp_path: Path
) -> None:
    """Computed in the run, found by the run, and prepared by the tower alone."""
    half = {"model": {"dtype": "bfloat16"}, "quantization": {"bnb_4bit_compute_dtype": "bfloat16"}}
    off = write_recipe(world, tmp_path / "off.yaml", "nf4", **half)
    disk = write_recipe(world, tmp_path / "disk.yaml", "nf4", data={"vision_cache": "disk"}, **half)

    def run(recipe: Path, name: str) -> Path:
        assert train.main([str(recipe), "--runs-dir", str(tmp_path), "--name", name]) == 0
        return tmp_path / name

    plain = run(off, "off")
    for name in ("misses", "hits"):
        loss, _ = apart(run(disk, name), plain)
        print(f"{name}: losses within {loss:.1e} relative")
        assert loss <= 1e-3
    (folder,) = (place / "disk").iterdir()
    for file in folder.glob("??/*"):
        file.unlink()
    assert prepare([str(disk), "--vision", "--quiet"]) == 0
    assert [other.name for other in (place / "disk").iterdir()] == [folder.name]  # made by the same tower
    loss, _ = apart(run(disk, "prepared"), plain)
    print(f"prepared: losses within {loss:.1e} relative")
    assert loss <= 1e-3
