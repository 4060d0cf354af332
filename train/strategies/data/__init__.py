"""Data parallelism: DDP, FSDP2 and the stages of ZeRO."""
