"""The tiny Qwen2-VL: it loads like the real one, and its training path computes what transformers computes."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from launch.errors import RunError
from trainer.embedded import pretrain, pretrain_data, pretrain_model, tiny_model
from trainer.embedded.charts import COLOURS
from trainer.embedded.questions import build_charts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.random_tiny(path)
    return path


@pytest.fixture(scope="module")
def charts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("charts") / "data"
    build_charts(path, charts=12)
    return path


def chat(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def test_model_and_processor_load_and_generate(folder: Path) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(chat("How many bars?"), tokenize=False, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (100, 60), "red")], return_tensors="pt")
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > batch["input_ids"].shape[1]
    assert (batch["input_ids"] == model.config.image_token_id).sum() == batch["image_grid_thw"].prod() // 4


def test_every_text_comes_back_from_its_ids(folder: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    for text in (
        "plain",
        "Élan vital, 50 % of £7; naïve 東京",
        "tabs\tand\n\nlines  ",
        "<|im_start|>user\nx<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [len(tokenizer(token).input_ids) for token in tiny_model.SPECIAL_TOKENS] == [1] * len(
        tiny_model.SPECIAL_TOKENS
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_renders_qwens_form(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    turns = [*chat("Why?"), {"role": "assistant", "content": "So."}]
    assert processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Why?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_one_seed_gives_one_model(folder: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    tiny_model.random_tiny(tmp_path / "same")
    tiny_model.random_tiny(tmp_path / "other", seed=1)
    weights = [path / "model.safetensors" for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_training_path_computes_what_transformers_computes(charts: Path) -> None:
    lessons = pretrain_data.read_lessons(charts)
    tokenizer = tiny_model.train_tokenizer(
        [*lessons.captions, *pretrain_data.SYSTEM_MESSAGES], vocab_size=400
    )
    processor = tiny_model.make_processor(tokenizer, pretrain.CHART_SHAPE)
    model = tiny_model.make_model(tokenizer, pretrain.CHART_SHAPE, seed=0).eval()
    teacher = pretrain_data.BatchSampler(processor, lessons, pretrain_data.Training(batch=2))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in lessons.images[:2]]
    seen = processor.image_processor(images=pictures, return_tensors="pt")
    batch = teacher.batch()
    ids, labels, start = batch.ids, batch.labels, batch.start
    patches = teacher.patches(lessons.images[:2])
    with pretrain_model.same_size_images(model), torch.no_grad():
        student = pretrain_model.BatchedModel(model, teacher.grid)
        ours = student.loss(ids, labels, patches, start) / (labels[:, 1:] != -100).sum()
        positions = student.positions(start, ids.shape[1])
    ids[:, start : start + teacher.visual] = model.config.image_token_id
    marks = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=labels, mm_token_type_ids=marks, **seen).loss
    expected, _ = model.model.get_rope_index(ids[:1], marks[:1], image_grid_thw=seen["image_grid_thw"][:1])
    assert torch.equal(expected[-3:], positions)
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_colours_are_renamed_as_the_channels_move() -> None:
    for order in pretrain_data.CHANNEL_ORDERS:
        names = pretrain_data.colour_names(order)
        for name, value in COLOURS.items():
            moved = tuple(value[channel] for channel in order)
            assert COLOURS[names[name]] == moved


def test_training_lowers_the_loss(charts: Path) -> None:
    lessons = pretrain_data.read_lessons(charts)
    tokenizer = tiny_model.train_tokenizer(pretrain_data.corpus(lessons), vocab_size=1000)
    model = tiny_model.make_model(tokenizer, pretrain.CHART_SHAPE, seed=0)
    training = pretrain_data.Training(steps=8, batch=4, warmup_steps=2)
    teacher = pretrain_data.BatchSampler(
        tiny_model.make_processor(tokenizer, pretrain.CHART_SHAPE), lessons, training
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = pretrain.train_tiny(model, teacher, training)
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_the_end_of_one_of_two_processes_is_said() -> None:
    here, there = multiprocessing.Pipe()
    there.close()
    partner = pretrain.Partner(0, here, torch.zeros(2, 2, 8))
    with pytest.raises(RunError, match="two processes"):
        partner.exchange(0, torch.ones(5))


def test_a_stopped_build_leaves_no_process_no_file_and_no_traceback(charts: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer.embedded import pretrain\n"
        "try: pretrain.build_tiny(*map(Path, sys.argv[1:]), progress=lambda *done: print(*done, flush=True))\n"
        "except KeyboardInterrupt: sys.exit(7)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model"), str(charts)]
    pipe = subprocess.PIPE
    build = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert build.stdout is not None
    assert build.stdout.readline() == f"1 {pretrain_data.Training().steps}\n"
    os.killpg(build.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, complaints = build.communicate(timeout=30)  # the end of the pipes: no process holds them any more
    assert (complaints, build.returncode) == ("", 7)
    assert list(tmp_path.iterdir()) == []


def test_one_process_and_two_build_the_same_bytes(
    charts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = pretrain_data.Training(steps=3, batch=4, warmup_steps=1)
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        pretrain.build_tiny(tmp_path / str(cores), charts, training=short)
    one, two = (tmp_path / cores / "model.safetensors" for cores in "12")
    assert one.read_bytes() == two.read_bytes()


def test_what_was_built_loads_and_sees_a_chart_in_few_tokens(
    charts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    short = pretrain_data.Training(steps=2, batch=2, warmup_steps=1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    pretrain.build_tiny(tmp_path / "model", charts, training=short, progress=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    data = pq.read_table(charts / "test-00000-of-00001.parquet")["image"][0]["bytes"].as_py()
    grid = processor.image_processor(images=[Image.open(io.BytesIO(data))], return_tensors="pt")[
        "image_grid_thw"
    ]
    assert 20 <= grid.prod() // 4 <= 60
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
