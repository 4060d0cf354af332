"""Distillation: a trained model teaches another one."""
