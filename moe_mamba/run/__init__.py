"""What a run leaves and shows: its folder, the console, metrics, plots."""
