"""Photos, priors and corrector: functions from values to values."""
