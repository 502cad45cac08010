"""The study: what Optuna proposes, what is stored, and the loop that trains group after group."""
