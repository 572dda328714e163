"""What users write: programs, run for real or read before they run."""
