"""Inputs of layers that wait for the backward in the host's memory."""
