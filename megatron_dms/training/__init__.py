"""What surrounds the model in training: data, teacher, forward step, metrics."""
