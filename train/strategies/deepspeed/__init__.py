"""DeepSpeed's engines: ZeRO, AutoTP, and its pipeline."""
