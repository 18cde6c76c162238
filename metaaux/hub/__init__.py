"""From and to the Hugging Face Hub: loading, publishing, model cards."""
