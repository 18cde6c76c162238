"""Settings of every training run, as YAML."""
