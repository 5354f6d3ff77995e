"""What turns a loss into a step on all ranks: `native` (DDP and expert sums) or `deepspeed` (ZeRO)."""
