"""Features, probes, fine-tuning, label-free scores and their reports."""
