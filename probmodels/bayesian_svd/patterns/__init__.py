"""What patterns do together: planes of modes that are not separated, and rotations to simple patterns."""
