"""The scheduling core: requests, block manager, prefix cache, scheduler. No torch, no clock, no I/O, no randomness."""
