"""What may be chosen, and what was chosen; without torch, Optuna and MLflow."""
