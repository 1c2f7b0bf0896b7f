"""A plain transformers + PEFT training on random tokens: nothing of ours but the tiny base's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments, set_seed

STEPS = 3
LORA = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    """Texts of random tokens, all of one length."""
    draw = torch.Generator().manual_seed(5)
    rows = torch.randint(5, 200, (count, 12), generator=draw)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def train(base: str, output: Path, **arguments: Any) -> Trainer:
    """Three steps of two samples a process, with a checkpoint at the last; the caller's engine."""
    AcceleratorState._reset_state(reset_partial_state=False)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    options = TrainingArguments(str(output), **{**settings, **arguments})
    set_seed(7)
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    trainer = Trainer(
        model=get_peft_model(model, LoraConfig(**LORA)),
        args=options,
        train_dataset=samples(24),
    )
    trainer.train()
    return trainer
