"""Frozen networks and the geometry that turns pictures and sound into faces, head poses, mattes and speech features."""
