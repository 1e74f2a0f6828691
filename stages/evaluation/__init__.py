"""How good corrected photos are: metrics, the sets they are measured on, honest baselines."""
