"""Configuration, planning, scheduling and the run of each command."""
