"""What the commands that measure, and the scripts behind every claim, have in common."""
