"""The inversion methods that ours is compared with."""
