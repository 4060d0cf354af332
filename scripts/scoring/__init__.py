"""Scores the planner's predictions against runs that other people published."""
