"""The floor that every process stands on: errors, seeds, ranks, checkpoints, logs. Imports nothing else of ours."""
