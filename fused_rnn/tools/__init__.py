"""What a user asks about layers: which engine runs, which plan is fastest, what works here."""
