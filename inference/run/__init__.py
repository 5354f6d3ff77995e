"""What executes a step: KV tensors, the flat batch, the paged context, the model runner, the sampler."""
