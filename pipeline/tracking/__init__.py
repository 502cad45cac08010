"""Who is told of a search while it runs: MLflow."""
