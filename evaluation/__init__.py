"""Benchmarks: tasks, the adapter to lm-evaluation-harness, the sandbox for generated programs, and the reports."""
