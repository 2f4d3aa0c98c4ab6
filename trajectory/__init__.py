"""What a run is: records, storage and seeds, shared by every other package."""
