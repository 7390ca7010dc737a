"""The only rooms that know ranks: process groups, the engine, and how a model is changed for a layout."""
