"""What is trained: data, model, loss and metrics. One module per kind of workload."""
