"""The SFTConfig and LoraConfig fields a recipe may not set and keys of other tools, with the reasons.

Of trl 1.16 with transformers 5.23, and of PEFT 0.21.
"""

_BY_REASON: dict[str, str] = {
    "the plan derives it from batch.global_batch_size and the hardware; set batch.global_batch_size": """
        per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size
        per_device_eval_batch_size""",
    "the plan owns precision and placement (model.dtype, quantization.*); remove it": """
        bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu local_rank""",
    "distribution belongs to the strategy; choose it with --strategy": """
        accelerator_config parallelism_config fsdp fsdp_config deepspeed ddp_find_unused_parameters
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout""",
    "our loss is the sum over all target tokens of the step divided by their global count; see data.loss": """
        average_tokens_across_devices label_smoothing_factor completion_only_loss assistant_only_loss
        loss_type neftune_noise_alpha router_aux_loss_coef""",
    "our data loader owns order, and packing, so that every world size sees the same; remove it": """
        data_seed dataloader_drop_last dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
        dataloader_in_order remove_unused_columns label_names train_sampling_strategy length_column_name
        dataset_text_field dataset_kwargs dataset_num_proc shuffle_dataset packing packing_strategy
        padding_free pad_to_multiple_of eval_packing""",
    "cutting a sample would cut image tokens; bound the image with data.max_pixels": """
        max_length truncation_mode""",
    "only torch's AdamW has state that moves between world sizes; set training.optim, training.adam_*": """
        optim_args optim_target_modules""",
    "write training.gradient_checkpointing: auto, true, false or every n-th layer; how it recomputes is ours": """
        activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs
        activation_offloading""",
    "the trainer chooses kernels itself, with the same numbers; remove it": """
        torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config
        use_cache torch_empty_cache_steps""",
    "write training.deterministic: true": "full_determinism",
    "metrics.jsonl has a line for every step, rank 0 alone shows progress; set training.logging_steps": """
        logging_strategy logging_first_step log_on_each_node include_num_input_tokens_seen log_level
        log_level_replica disable_tqdm""",
    "a loss that is not finite stops the run before the weights change; remove it": "logging_nan_inf_filter",
    "set it in the section tracking": """
        report_to project trackio_space_id trackio_bucket_id trackio_static_space_id""",
    "the run's name is the recipe's name or --name": "run_name",
    "the run directory is chosen with --runs-dir and --name": "output_dir",
    "set it in the section evaluation": """
        eval_strategy eval_steps eval_delay prediction_loss_only eval_on_start eval_do_concat_batches
        eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics""",
    "set it in the section checkpoint": """
        save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint""",
    "running the same command again resumes from the newest published checkpoint; remove it": """
        resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint""",
    "the run keeps its last adapter, and `samestep evaluate RUN/checkpoint-N` scores another; remove it": """
        load_best_model_at_end metric_for_best_model greater_is_better""",
    "set it in the section hub": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "set it in the section model": "model_init_kwargs",
    "no code from a hub repository is run; remove it": "trust_remote_code",
    "the tokenizer of the base model is kept; remove it": "eos_token pad_token",
    "a chat template of your own is called data.chat_template": "chat_template_path",
    "it does nothing here: samestep calls the trainer itself; remove it": """
        debug skip_memory_metrics do_train do_eval do_predict""",
}

REFUSED_TRAINING_FIELDS: dict[str, str] = {
    field: reason for reason, fields in _BY_REASON.items() for field in fields.split()
}

_LORA_BY_REASON: dict[str, str] = {
    "LoRA here trains matrices beside frozen linear layers, nothing else of the base; add linear layers to "
    "lora.target_modules": """
        trainable_token_indices target_parameters layer_replication ensure_weight_tying lora_bias""",
    "a module trained whole is not shown to take the same steps in every world: the loss reads lm_head as frozen, "
    "embeddings may be tied to it, and the merger is held in 4 bits; name linear layers in lora.target_modules, of the "
    "merger too (merger.mlp.0, or linear_fc1 of a Qwen3-VL)": "modules_to_save",
    "it begins from other base weights than are quantized, so merged and resumed runs would differ; remove it": """
        init_lora_weights loftq_config eva_config corda_config lora_ga_config""",
    "name the layers in lora.target_modules, such as layers.3.self_attn.q_proj": """
        layers_to_transform layers_pattern exclude_modules""",
    "the same steps on every number of GPUs are not shown for it, and merging would not be exact; remove it": """
        use_qalora qalora_group_size use_bdlora arrow_config kasa_config velora_config monteclora_config
        alora_invocation_tokens runtime_config megatron_config megatron_core fan_in_fan_out""",
    "samestep sets it itself; remove it": """
        task_type peft_type auto_mapping peft_version base_model_name_or_path inference_mode""",
    "it is set with model.revision": "revision",
}

REFUSED_LORA_FIELDS: dict[str, str] = {
    f"lora.{field}": reason for reason, fields in _LORA_BY_REASON.items() for field in fields.split()
}
"""The LoraConfig fields of PEFT 0.21 that a recipe may not set, by their dotted key."""

_OF_OTHER_TOOLS: dict[str, str] = {
    "a recipe names no hardware; say it with --nodes and --gpus-per-node": """
        num_gpus n_gpus n_gpu gpus num_gpus_per_node num_processes nproc_per_node devices world_size num_nodes nnodes
        num_machines nodes gpus_per_node""",
    "distribution belongs to the strategy; choose it with --strategy": "strategy distributed_type zero_stage",
    "the plan derives it from batch.global_batch_size and the hardware; set batch.global_batch_size": """
        batch_size micro_batch_size train_batch_size train_micro_batch_size_per_gpu per_gpu_train_batch_size
        grad_accumulation_steps accumulate_grad_batches""",
    "the rank is called lora.r": "rank lora_r lora_rank",
    "the learning rate is called training.learning_rate": "lr",
    "write training.warmup_steps: a share of the steps below 1, or a whole number of them": "warmup_ratio",
    "cutting a sample would cut image tokens; bound the image with data.max_pixels": """
        max_seq_length max_seq_len model_max_length cutoff_len sequence_len""",
    "the base is called model.name_or_path": "model_name_or_path model_name base_model model_id pretrained_model",
    "the data are called data.dataset": "dataset_name dataset_path dataset_id",
    "8-bit bases are not trained here; set quantization.load_in_4bit": "load_in_8bit quantization_bit",
    "set it in the section evaluation": "evaluation_strategy",
    "the run directory is chosen with --runs-dir and --name": "logging_dir overwrite_output_dir",
}

OF_OTHER_TOOLS: dict[str, str] = {
    field: reason for reason, fields in _OF_OTHER_TOOLS.items() for field in fields.split()
}
"""What people bring from accelerate, DeepSpeed, axolotl, LLaMA-Factory, Lightning and older transformers."""
