"""How a run ends: signals, the watchdog, the coordinator that names the first rank to fail."""
