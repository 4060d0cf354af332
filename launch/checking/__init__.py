"""Predictions beside what runs measured."""
