"""The first wrong part of the update, where all activations and their gradients are right."""
