"""What Transformers and its checkpoints have to do with ours: formats, tokenizer files, the model class."""
