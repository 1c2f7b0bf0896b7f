"""How the processes of a strategy share gradients and optimizer state: replicated (single, ddp, fsdp) or ZeRO."""
