"""What is written by hand of the two files for Transformers; ``hf.assemble`` puts the rest around it."""
