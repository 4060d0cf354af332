"""What a layout would cost before it runs: step time and memory from closed forms. Torch is not imported."""
