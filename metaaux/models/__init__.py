"""The networks, one file each. Their module paths are part of the checkpoint format (`model_index.json`)."""
