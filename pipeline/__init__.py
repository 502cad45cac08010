"""Search learning-rate strategies for a PyTorch model; importing this package imports nothing heavy.

Start reading at `pipeline.search`.
"""

__version__ = "0.1.0"
