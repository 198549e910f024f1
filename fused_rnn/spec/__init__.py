"""What describes a call of a layer, and knows no engine."""
