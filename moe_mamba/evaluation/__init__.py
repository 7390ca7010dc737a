"""Scores of a model: on held-out text, and in EleutherAI's harness."""
