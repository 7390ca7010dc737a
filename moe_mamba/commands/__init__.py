"""The commands: each a function ``main`` over the package, whose signature is the flags; nothing is decided here."""
