"""What runs one layer: the choice among the engines, and the engines."""
