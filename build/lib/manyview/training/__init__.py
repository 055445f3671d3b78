"""What train.py is made of besides data and model: one step, optimizer and schedule, checkpoints, logs and plots."""
