"""What is recorded of steps: their report, means over several, and what detectors see in them."""
