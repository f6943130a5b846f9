"""What a run takes, by formula: FLOPs, memory, time and money."""
