"""The report of a study: one HTML file, from what the study found. No torch, Optuna, MLflow."""
