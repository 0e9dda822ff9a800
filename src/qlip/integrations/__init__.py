"""What other libraries do for us: one file each, behind an extra."""
