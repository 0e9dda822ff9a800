"""What the commands do over many pictures."""
