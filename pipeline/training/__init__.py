"""Train trials: from configs and a workload to the metrics of epochs."""
