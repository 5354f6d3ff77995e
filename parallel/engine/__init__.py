"""What turns losses into a step on all ranks: DDP and sums, FSDP2, pipelines, or DeepSpeed's ZeRO."""
