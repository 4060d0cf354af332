"""Checks that hold `single`, the reference of every proof, against what others wrote: transformers, torch and numpy.

Each check is a function that raises `Differs`. The ordinary tests call it, and the tests of planted bugs call the same
function with a bug in the product.
"""
