"""To and from Hugging Face's formats, and from dense models to mixtures."""
