"""Strict YAML, atomic files, SQLite by path, locks, signals: knows nothing of searches."""
