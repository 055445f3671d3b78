"""What tools/profile.py measures: one module a subcommand."""
