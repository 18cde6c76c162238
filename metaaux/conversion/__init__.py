"""Foreign checkpoints to this project's folders of configuration and safetensors. No code of a file is ever run."""
