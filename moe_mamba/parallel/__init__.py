"""The only package that knows ranks: process groups, the engine, and how a model is changed for a layout."""
