"""Descriptions of a layout as text: its mesh, its memory and its communication."""
