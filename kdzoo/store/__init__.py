"""Keep what a run leaves on disk: its folder, checkpoints, lock and curves."""
