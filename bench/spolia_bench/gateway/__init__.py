"""What the way through the gateway costs."""
