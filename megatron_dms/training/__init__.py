"""The retrofit: start-up, student and teacher, forward step, metrics."""
