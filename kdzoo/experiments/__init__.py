"""Arrange trainings: single runs, suites, teachers, and where they run."""
