"""Text from a trained model, in one process: keys and values that are kept, sampling, and what the tokens say."""
