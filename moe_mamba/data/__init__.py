"""Data: documents (corpus), tokenizers, shards in Megatron's format, and windows of tokens in a fixed order."""
