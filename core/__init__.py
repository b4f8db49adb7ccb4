"""What stages share, one subject a file."""
