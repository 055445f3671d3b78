"""Engines turn (sample ids, parameters) into view tensors; they draw nothing themselves."""
